"""Settings, files, processes, hardware, terminal, text and plots: what every other package uses."""
