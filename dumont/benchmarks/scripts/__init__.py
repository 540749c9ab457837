"""Programs that the benchmark runs by path as processes of their own. They do not use Dumont."""
