"""Hardware: matrix products, memory, measured rates and the roofline."""
