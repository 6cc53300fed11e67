//! Connections by TLS: the certificate of the server is verified.
