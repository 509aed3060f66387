"""What tests share: models, processes, stand-ins for outside programs, and records to compare."""
