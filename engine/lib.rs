#![doc = "strand-engine"]
