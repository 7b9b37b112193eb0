"""What Ray costs a request, and how far one ingress reaches."""
