"""Programs that the bench runs as processes of their own, by path: they know nothing of Dumont."""
