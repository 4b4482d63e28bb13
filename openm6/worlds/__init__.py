"""Generated data sets, for the demo and for tests: the catalogue, studio pictures, a market, a shop, people, pets."""
