"""What results say to a person."""
