"""The decode step on a CPU as compiled loops: ``attend`` for a layer's attention, ``update`` for what happens between
two steps, ``merge`` for D2O's merge in both. Imported by ``decode`` alone."""
