"""What changed between two tables, or between the tables that two results compile to, and by how much."""
