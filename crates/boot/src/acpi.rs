//! The ACPI tables of a hardware-reduced machine: RSDP, XSDT, FADT, MADT, DSDT, and MCFG where there is PCI.
//!
//! ACPI 6.5, 5.2. Hardware-reduced means that the fixed registers of a PC do not exist and no
//! kernel waits for them; power off and reset are one register each. The DSDT's contents come from
//! the devices themselves. Left out on purpose: processor objects (all that they could say stands
//! in the MADT) and an FACS (there is nothing to wake up from).

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use memory::layout;

const OEM: [u8; 6] = *b"VMM   ";
const TABLE: [u8; 8] = *b"VMMACPI ";
const REVISION: u32 = 1;
const HEADER: u32 = 36;

/// FADT, IA-PC boot architecture flags (5.2.9.3): no VGA, no CMOS clock, no MSI restriction, and,
/// by their absence, no legacy devices and no keyboard controller.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// What the tables say of one machine.
#[derive(Clone, Debug, Default)]
pub struct AcpiSpec {
    /// Processors, whose APIC ids count from 0.
    pub vcpus: u8,
    /// The devices' AML, which goes into the DSDT as it is.
    pub dsdt: Vec<u8>,
    /// Whether there is a PCI segment, with its configuration spaces at [`layout::PCI_ECAM`].
    pub pci: bool,
    /// The port of the sleep control register (4.8.3.7).
    pub sleep_control: u16,
    /// The port of the sleep status register.
    pub sleep_status: u16,
    /// The port and the value that reset the machine (4.8.3.6).
    pub reset: (u16, u8),
}

impl AcpiSpec {
    /// The tables as they stand at [`layout::ACPI`], the RSDP first.
    ///
    /// # Panics
    ///
    /// When the devices' AML does not fit: it is ours, and a few hundred bytes a device.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut tables = Tables { bytes: vec![0; Rsdp::len()] };
        let mut dsdt = Sdt::new(*b"DSDT", HEADER, 2, OEM, TABLE, REVISION);
        dsdt.append_slice(&self.dsdt);
        let dsdt = tables.append(&dsdt);
        let fadt = tables.append(&self.fadt(dsdt).finalize());
        let madt = tables.append(&self.madt());
        let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
        xsdt.add_entry(fadt);
        xsdt.add_entry(madt);
        if self.pci {
            // One segment with one bus (PCI Firmware 3.3, 4.1.2).
            let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
            mcfg.add_ecam(layout::PCI_ECAM, 0, 0, 0);
            xsdt.add_entry(tables.append(&mcfg));
        }
        let xsdt = tables.append(&xsdt);
        let mut rsdp = Vec::new();
        Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
        tables.bytes[..rsdp.len()].copy_from_slice(&rsdp);
        assert!(tables.bytes.len() as u64 <= layout::ACPI.end - layout::ACPI.start);
        tables.bytes
    }

    fn fadt(&self, dsdt: u64) -> FADTBuilder {
        let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
            .dsdt_64(dsdt)
            .preferred_pm_profile(PmProfile::EnterpriseServer)
            .flag(Flags::Wbinvd)
            .flag(Flags::HwReducedAcpi)
            .flag(Flags::ResetRegSup)
            // The power and sleep buttons, where there are any, are devices of the DSDT.
            .flag(Flags::PwrButton)
            .flag(Flags::SlpButton)
            .flag(Flags::FixRtc)
            .flag(Flags::Headless);
        fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
        fadt.reset_reg = port(self.reset.0);
        fadt.reset_value = self.reset.1;
        fadt.sleep_control_reg = port(self.sleep_control);
        fadt.sleep_status_reg = port(self.sleep_status);
        fadt
    }

    fn madt(&self) -> MADT {
        let address = |address: u64| u32::try_from(address).expect("in the hole below 4 GiB");
        let local = LocalInterruptController::Address(address(layout::LOCAL_APIC));
        let mut madt = MADT::new(OEM, TABLE, REVISION, local);
        for id in 0..self.vcpus {
            madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
        }
        madt.add_structure(IoApic::new(0, address(layout::IO_APIC), 0));
        madt
    }
}

/// One byte-wide register in port space.
fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address.into())
}

struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table, aligned, and returns its guest-physical address.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = layout::ACPI.start + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(vcpus: u8) -> Vec<u8> {
        let dsdt = vec![0x5b; 100];
        AcpiSpec { vcpus, dsdt, pci: true, sleep_control: 0x600, sleep_status: 0x601, reset: (0x602, 1) }.bytes()
    }

    fn at(bytes: &[u8], address: u64) -> &[u8] {
        &bytes[usize::try_from(address - layout::ACPI.start).unwrap()..]
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// One table, found by following the pointers as a kernel does.
    fn table<'a>(bytes: &'a [u8], signature: &[u8; 4]) -> &'a [u8] {
        let length = |table: &[u8]| u32::from_le_bytes(table[4..8].try_into().unwrap()) as usize;
        let xsdt = at(bytes, u64_at(bytes, 24));
        let mut found = (36..length(xsdt)).step_by(8).map(|entry| at(bytes, u64_at(xsdt, entry)));
        let table = match signature {
            b"DSDT" => at(bytes, u64_at(table(bytes, b"FACP"), 140)),
            _ => found.find(|table| &table[..4] == signature).unwrap(),
        };
        &table[..length(table)]
    }

    #[test]
    fn every_table_is_found_from_the_root_and_its_bytes_add_up_to_zero() {
        let bytes = tables(2);
        assert_eq!(&bytes[..8], b"RSD PTR ");
        for signature in [b"FACP", b"APIC", b"MCFG", b"DSDT"] {
            let sum = table(&bytes, signature).iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "{signature:?}");
        }
        assert_eq!(table(&bytes, b"DSDT").len(), 36 + 100);
    }

    #[test]
    fn the_fadt_declares_hardware_reduced_acpi_with_its_three_registers() {
        let bytes = tables(1);
        let fadt = table(&bytes, b"FACP");
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_ne!(flags & (1 << 20), 0);
        assert_ne!(flags & (1 << 10), 0);
        assert_eq!((u64_at(fadt, 120), fadt[128]), (0x602, 1));
        assert_eq!((u64_at(fadt, 248), u64_at(fadt, 260)), (0x600, 0x601));
    }

    #[test]
    fn the_madt_lists_every_processor_and_the_io_apic() {
        let bytes = tables(255);
        let madt = table(&bytes, b"APIC");
        assert_eq!(madt.len(), 44 + 255 * 8 + 12);
        assert_eq!(madt[44 + 254 * 8..][..5], [0, 8, 254, 254, 1]);
        assert_eq!(madt[44 + 255 * 8], 1);
    }

    #[test]
    fn the_mcfg_says_where_the_one_bus_is_configured() {
        let bytes = tables(1);
        let mcfg = table(&bytes, b"MCFG");
        assert_eq!((mcfg.len(), u64_at(mcfg, 44), u64_at(mcfg, 52)), (60, layout::PCI_ECAM, 0));
        let without = AcpiSpec::default().bytes();
        assert!(!without.windows(4).any(|word| word == b"MCFG"));
    }
}
