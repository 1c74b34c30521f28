"""What the machine gives and refuses: errors, files, downloads, processes, the mesh."""
