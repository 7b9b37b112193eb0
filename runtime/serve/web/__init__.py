"""The server's face: routes, their answers, and who may ask."""
