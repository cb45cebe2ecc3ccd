//! The only user of the KVM API: virtual machines and virtual processors.
