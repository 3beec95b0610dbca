"""Models that read text, and say something of it other than how it goes on."""
