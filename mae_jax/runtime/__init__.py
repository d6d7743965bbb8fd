"""What a program needs of the machine: devices, mesh and layouts, processes, signals, errors and console."""
