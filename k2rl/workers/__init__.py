"""The Ray actors that own trainer and inference engine, and the driver's handles on them."""
