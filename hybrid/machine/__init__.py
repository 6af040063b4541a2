"""What this machine is and does: host, calibrations, devices."""
