"""The model that trains: found and loaded, with adapters, what of it trains, its loss, and long streams."""
