"""A router in a caller's own process: it joins a running cluster, follows its controller, and answers calls here."""
