//! Puts a Linux kernel into guest memory: images, KASLR, zero page, PVH, ACPI.
