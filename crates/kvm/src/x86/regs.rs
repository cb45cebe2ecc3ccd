//! The registers that a processor starts a kernel with.
//!
//! Linux boot protocol, "64-bit Boot Protocol"; the PVH start ABI of Xen's `start_info.h`. Where
//! the tables that the registers point to lie is the caller's business.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

/// How the first processor enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Long mode with paging on, `%rsi` at the zero page.
    Linux64 {
        /// The first instruction.
        rip: u64,
        /// `struct boot_params`.
        zero_page: u64,
        /// The page tables' root.
        page_tables: u64,
        /// A table of [`GDT_ENTRIES`].
        gdt: u64,
    },
    /// 32-bit protected mode without paging, `%ebx` at `hvm_start_info`.
    Pvh {
        /// The first instruction.
        eip: u64,
        /// `struct hvm_start_info`.
        start_info: u64,
        /// A table of [`GDT_ENTRIES`].
        gdt: u64,
    },
}

/// Selectors that the boot protocol prescribes (`__BOOT_CS`, `__BOOT_DS`).
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Access rights of a flat segment, as a descriptor's bits 40 to 55.
const CODE64: u16 = 0xa09b;
const CODE32: u16 = 0xc09b;
const DATA32: u16 = 0xc093;
const TASK64: u16 = 0x008b;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS always reads as one.
const RFLAGS_RESERVED: u64 = 1 << 1;

impl Entry {
    /// The descriptor table that [`Entry`]'s `gdt` must point to.
    pub fn gdt_entries(self) -> [u64; 5] {
        let code = match self {
            Self::Linux64 { .. } => CODE64,
            Self::Pvh { .. } => CODE32,
        };
        [0, 0, descriptor(code), descriptor(DATA32), descriptor(TASK64)]
    }

    /// The general registers.
    pub fn regs(self) -> kvm_regs {
        let regs = kvm_regs { rflags: RFLAGS_RESERVED, ..kvm_regs::default() };
        match self {
            Self::Linux64 { rip, zero_page, .. } => kvm_regs { rip, rsi: zero_page, ..regs },
            Self::Pvh { eip, start_info, .. } => kvm_regs { rip: eip, rbx: start_info, ..regs },
        }
    }

    /// The system registers, on top of what a reset leaves (`base`).
    pub fn sregs(self, base: kvm_sregs) -> kvm_sregs {
        let data = segment(DATA, DATA32);
        let mut sregs = kvm_sregs {
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: kvm_segment { limit: 0x67, g: 0, ..segment(TASK, TASK64) },
            ..base
        };
        sregs.gdt.limit = 5 * 8 - 1;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        match self {
            Self::Linux64 { page_tables, gdt, .. } => {
                sregs.cs = segment(CODE, CODE64);
                sregs.gdt.base = gdt;
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.cr3 = page_tables;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
            }
            Self::Pvh { gdt, .. } => {
                sregs.cs = segment(CODE, CODE32);
                sregs.gdt.base = gdt;
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                sregs.efer = 0;
            }
        }
        sregs
    }
}

/// The mode that a processor is in.
pub fn mode(sregs: &kvm_sregs) -> &'static str {
    let protected = sregs.cr0 & CR0_PE != 0;
    let long = sregs.efer & EFER_LMA != 0;
    match (protected, long, sregs.cs.l == 1, sregs.cs.db == 1) {
        (false, ..) => "real mode",
        (true, true, true, _) => "64-bit long mode",
        (true, _, _, true) => "32-bit protected mode",
        (true, _, _, false) => "16-bit protected mode",
    }
}

/// A flat descriptor, base 0 and limit 4 GiB, with the given access rights.
const fn descriptor(access: u16) -> u64 {
    0xffff | ((access as u64) << 40) | (0xf << 48)
}

/// The segment register that loading [`descriptor`] would give.
fn segment(selector: u16, access: u16) -> kvm_segment {
    let bit = |at: u32| u8::from(access >> at & 1 == 1);
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: u8::try_from(access & 0xf).expect("four bits"),
        s: bit(4),
        dpl: 0,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_64_bit_entry_has_paging_on_and_the_zero_page_in_rsi() {
        let entry = Entry::Linux64 { rip: 0x100_0000, zero_page: 0x7000, page_tables: 0x9000, gdt: 0x500 };
        let sregs = entry.sregs(kvm_sregs::default());
        assert_eq!(entry.regs().rsi, 0x7000);
        assert_eq!((sregs.cr3, sregs.efer), (0x9000, 0x500));
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
        assert_eq!(sregs.cs.type_, 0xb);
    }

    #[test]
    fn the_pvh_entry_is_flat_protected_mode_with_the_start_info_in_ebx() {
        let entry = Entry::Pvh { eip: 0x100_0000, start_info: 0x6000, gdt: 0x500 };
        let sregs = entry.sregs(kvm_sregs::default());
        assert_eq!(entry.regs().rbx, 0x6000);
        assert_eq!((sregs.cr0 & CR0_PG, sregs.cr4, sregs.efer), (0, 0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.g), (0, 1, 1));
        assert_eq!(sregs.ss.type_, 3);
    }

    #[test]
    fn the_descriptor_table_says_what_the_segment_registers_say() {
        let entry = Entry::Linux64 { rip: 0, zero_page: 0, page_tables: 0, gdt: 0 };
        // The values that the processor manuals give for flat 64-bit code and data.
        assert_eq!(entry.gdt_entries()[2], 0x00af_9b00_0000_ffff);
        assert_eq!(entry.gdt_entries()[3], 0x00cf_9300_0000_ffff);
    }
}
