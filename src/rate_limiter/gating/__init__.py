"""What both gates share: limits, and the engine that decides about jobs. It knows no broker."""
