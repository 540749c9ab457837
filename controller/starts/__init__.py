"""From a request to an instance that serves: `start` is one deployment's way there, `starts` shares them."""
