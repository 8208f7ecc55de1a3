"""Shared basics: settings, files, processes, hardware, terminal, text and plots."""
