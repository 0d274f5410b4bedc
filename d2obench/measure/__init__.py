"""What a request costs: time, memory and energy of its phases, and the machine it was measured on."""
