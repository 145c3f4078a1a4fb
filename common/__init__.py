"""The ground floor: errors, files and command lines; imports nothing above it, nor torch."""
