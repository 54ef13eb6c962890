"""AVadCLIP, fast and exact."""
