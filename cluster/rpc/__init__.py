"""The protocol that client and server share: methods, documents, streams, status codes and channel options."""
