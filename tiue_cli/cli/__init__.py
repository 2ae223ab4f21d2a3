"""The commands of ``tiue``, one file each."""
