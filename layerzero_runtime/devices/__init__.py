"""What the machine says of its devices: processors, NVIDIA GPUs through NVML, which of them are visible."""
