//! The OCI hook: policy and injection.
