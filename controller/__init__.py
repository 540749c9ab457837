"""The controller: deployments, start modes, routing and expiry. It never touches a process."""
