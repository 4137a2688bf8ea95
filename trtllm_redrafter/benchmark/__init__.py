"""Does drafting help, how much, and with which setting? Measured against autoregression, with intervals."""
