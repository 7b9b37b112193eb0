"""The server on Ray Serve: requests are taken in one process, and drawn by replicas of the model on any machine."""
