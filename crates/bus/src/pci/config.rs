//! The configuration space of a PCI function: a header of type 0, base address registers (BARs), capabilities.
//!
//! PCI Local Bus 3.0, chapter 6. A register is what a guest may write of it: one image of bytes, and beside it one of
//! write masks, so no write needs a case of its own and sizing a BAR is a write like any other. A BAR decodes at the
//! address where it was placed before the guest started, and only while its register holds that address: a guest that
//! moves it finds nothing at the new address, and its registers again once it moves it back. Left out on purpose: I/O
//! ports, the INTx line (the interrupt pin reads as none), expansion ROMs, the bits of the status register that report
//! errors, bus mastering as a condition for anything, and the extended space above 256 bytes, which reads as zero: the
//! header that says that there are no extended capabilities.

/// Bytes of configuration space that a function's window of the segment has.
pub const SPACE: usize = 4096;
/// Bytes of it that a function without extended capabilities uses.
const USED: usize = 256;

/// Registers of the header (figure 6-2).
const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const CACHE_LINE: usize = 0x0c;
const BARS: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// Where capabilities begin: behind the header.
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_NO_INTX: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// The low bits of a memory BAR (6.2.5.1), which cannot be written.
const BAR_64: u32 = 0b0100;
const BAR_PREFETCHABLE: u32 = 0b1000;
const BAR_FLAGS: u32 = 0b1111;

/// What a function says that it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity {
    /// The vendor, and the device as the vendor counts them.
    pub vendor: u16,
    /// See `vendor`.
    pub device: u16,
    /// The revision of the device.
    pub revision: u8,
    /// Base class, sub-class and programming interface, from the highest byte of three to the lowest.
    pub class: u32,
    /// The vendor of the board that the function is on.
    pub subsystem_vendor: u16,
    /// The board, as its vendor counts them.
    pub subsystem: u16,
}

/// Where a region may be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Registers below 4 GiB.
    Memory32,
    /// Memory without side effects of a read, at any address. It takes two registers.
    Prefetchable64,
}

/// A region that a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// The number of its register, 0 to 5.
    pub index: usize,
    /// Where it may be placed.
    pub kind: BarKind,
    /// Its bytes, a power of two.
    pub size: u64,
    /// Where it was placed; 0 before that.
    pub address: u64,
}

/// A function's configuration space.
#[derive(Debug)]
pub struct Config {
    bytes: [u8; USED],
    /// The bits of `bytes` that a guest may write.
    writable: [u8; USED],
    bars: Vec<Bar>,
    /// The register that points to the next capability, and where that one goes.
    link: usize,
    free: usize,
}

impl Config {
    /// The space of a function without BARs and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut config = Self {
            bytes: [0; USED],
            writable: [0; USED],
            bars: Vec::new(),
            link: CAPABILITIES,
            free: FIRST_CAPABILITY,
        };
        config.set(VENDOR, &identity.vendor.to_le_bytes());
        config.set(DEVICE, &identity.device.to_le_bytes());
        config.set(REVISION, &[identity.revision]);
        config.set(CLASS, &identity.class.to_le_bytes()[..3]);
        config.set(SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        config.set(SUBSYSTEM, &identity.subsystem.to_le_bytes());
        config.allow(COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX).to_le_bytes());
        // Scratch registers that firmware and kernels leave notes in for each other.
        config.allow(CACHE_LINE, &[0xff]);
        config.allow(INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Adds a region of `size` bytes behind the BAR number `index`.
    ///
    /// # Panics
    ///
    /// When the registers are taken or the size is not one that a BAR can tell: functions are ours, not the guest's.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) {
        let wide = kind == BarKind::Prefetchable64;
        assert!(index + usize::from(wide) < 6 && self.bars.iter().all(|bar| !bar.registers().contains(&index)));
        assert!(size.is_power_of_two() && size > BAR_FLAGS.into() && (wide || size <= 1 << 31), "a BAR of {size:#x}");
        let mask = (!(size - 1)).to_le_bytes();
        let flags = if wide { BAR_64 | BAR_PREFETCHABLE } else { 0 };
        self.set(BARS + 4 * index, &flags.to_le_bytes());
        self.allow(BARS + 4 * index, if wide { &mask } else { &mask[..4] });
        self.bars.push(Bar { index, kind, size, address: 0 });
    }

    /// Adds a capability: its id, and what follows the pointer to the next one, with the bits of it that a guest may
    /// write. Returns the register at which it begins.
    ///
    /// # Panics
    ///
    /// When there is no room: capabilities are ours, not the guest's.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.free;
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        self.set(self.link, &[u8::try_from(at).expect("within 256 bytes")]);
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.link = at + 1;
        // Each begins at a register of 32 bits (6.7).
        self.free = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// The regions, in the order in which they were added.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// Places the region of the BAR number `index` at `address`, from where on the function decodes it.
    ///
    /// # Panics
    ///
    /// When there is no such region, or the address is not one that its BAR can hold: both are ours.
    pub fn place(&mut self, index: usize, address: u64) {
        let bar = self.bars.iter_mut().find(|bar| bar.index == index).expect("a region that was added");
        assert!(address.is_multiple_of(bar.size), "a region at {address:#x}");
        bar.address = address;
        let bar = *bar;
        self.write(BARS + 4 * index, &address.to_le_bytes()[..4 * bar.registers().len()]);
        assert_eq!(self.bar_register(&bar), address);
        self.set(COMMAND, &COMMAND_MEMORY.to_le_bytes());
    }

    /// Whether the function answers at the address where the region of the BAR number `index` was placed.
    pub fn decodes(&self, index: usize) -> bool {
        let enabled = self.u16_at(COMMAND) & COMMAND_MEMORY != 0;
        let bar = self.bars.iter().find(|bar| bar.index == index);
        enabled && bar.is_some_and(|bar| bar.address != 0 && self.bar_register(bar) == bar.address)
    }

    /// The guest reads `data.len()` bytes at `register`; what reaches past the space reads as all ones.
    pub fn read(&self, register: usize, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(register.min(SPACE)..) {
            *byte = match at {
                0..USED => self.bytes[at],
                USED..SPACE => 0,
                _ => 0xff,
            };
        }
    }

    /// The guest writes `data` at `register`; what may not be written, or reaches past the space, is dropped.
    pub fn write(&mut self, register: usize, data: &[u8]) {
        for (value, at) in data.iter().zip(register..USED) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
        }
    }

    /// The register of 16 bits at `register`, which must lie in the first 256 bytes.
    pub fn u16_at(&self, register: usize) -> u16 {
        u16::from_le_bytes([self.bytes[register], self.bytes[register + 1]])
    }

    /// The register of 32 bits at `register`, which must lie in the first 256 bytes.
    pub fn u32_at(&self, register: usize) -> u32 {
        u32::from(self.u16_at(register)) | u32::from(self.u16_at(register + 2)) << 16
    }

    /// The address that the guest sees in the register, or the pair of them, of a BAR.
    fn bar_register(&self, bar: &Bar) -> u64 {
        let low = self.u32_at(BARS + 4 * bar.index) & !BAR_FLAGS;
        let high = match bar.kind {
            BarKind::Memory32 => 0,
            BarKind::Prefetchable64 => self.u32_at(BARS + 4 * bar.index + 4),
        };
        u64::from(high) << 32 | u64::from(low)
    }

    fn set(&mut self, register: usize, value: &[u8]) {
        self.bytes[register..register + value.len()].copy_from_slice(value);
    }

    fn allow(&mut self, register: usize, mask: &[u8]) {
        self.writable[register..register + mask.len()].copy_from_slice(mask);
    }
}

impl Bar {
    /// The numbers of the registers that it takes.
    fn registers(&self) -> std::ops::Range<usize> {
        match self.kind {
            BarKind::Memory32 => self.index..self.index + 1,
            BarKind::Prefetchable64 => self.index..self.index + 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let identity = Identity {
            vendor: 0x1234,
            device: 0x5678,
            revision: 9,
            class: 0x02_0a_0b,
            subsystem_vendor: 0x1a2b,
            subsystem: 0x3c4d,
        };
        let mut config = Config::new(identity);
        config.add_bar(0, BarKind::Memory32, 0x8000);
        config.add_bar(2, BarKind::Prefetchable64, 1 << 33);
        config.place(0, 0xc000_8000);
        config.place(2, 3 << 33);
        config
    }

    fn read32(config: &Config, register: usize) -> u32 {
        let mut data = [0; 4];
        config.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_header_says_what_the_function_is() {
        let config = config();
        assert_eq!(read32(&config, VENDOR), 0x5678_1234);
        assert_eq!(read32(&config, REVISION), 0x020a_0b09);
        assert_eq!(read32(&config, SUBSYSTEM_VENDOR), 0x3c4d_1a2b);
        assert_eq!(read32(&config, CACHE_LINE) >> 16, 0, "a header of type 0, one function");
        assert_eq!(read32(&config, INTERRUPT_LINE), 0, "no interrupt pin");
        assert_eq!(read32(&config, 0x100), 0, "no extended capability");
    }

    #[test]
    fn a_bar_of_32_bits_tells_its_size_and_takes_its_address_back() {
        let mut config = config();
        let before = read32(&config, BARS);
        assert_eq!(before, 0xc000_8000);
        config.write(BARS, &[0xff; 4]);
        assert_eq!(read32(&config, BARS), 0xffff_8000);
        assert!(!config.decodes(0));
        config.write(BARS, &before.to_le_bytes());
        assert!(config.decodes(0));
        config.write(BARS + 4, &[0xff; 4]);
        assert_eq!(read32(&config, BARS + 4), 0, "a register without a region");
    }

    #[test]
    fn a_bar_of_64_bits_tells_its_size_over_both_registers() {
        let mut config = config();
        assert_eq!((read32(&config, BARS + 8), read32(&config, BARS + 12)), (0xc, 6));
        config.write(BARS + 8, &[0xff; 8]);
        assert_eq!((read32(&config, BARS + 8), read32(&config, BARS + 12)), (0xc, 0xffff_fffe));
        assert!(!config.decodes(2));
        config.write(BARS + 8, &[0, 0, 0, 0, 6, 0, 0, 0]);
        assert!(config.decodes(2));
    }

    #[test]
    fn a_region_is_decoded_only_where_it_was_placed_and_while_memory_is_enabled() {
        let mut config = config();
        assert!(config.decodes(0) && config.decodes(2) && !config.decodes(1) && !config.decodes(5));
        config.write(COMMAND, &[0, 0]);
        assert!(!config.decodes(0) && !config.decodes(2));
        config.write(COMMAND, &[0xff, 0xff]);
        assert_eq!(config.u16_at(COMMAND), COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX);
        assert!(config.decodes(0));
        config.write(BARS, &0xc100_0000u32.to_le_bytes());
        assert!(!config.decodes(0) && config.decodes(2));
    }

    #[test]
    fn a_walk_over_the_capabilities_finds_each_one_and_ends() {
        let mut config = config();
        assert_eq!(config.u16_at(STATUS) & STATUS_CAPABILITIES, 0);
        let first = config.add_capability(9, &[1, 2, 3], &[]);
        let second = config.add_capability(0x11, &[4; 10], &[0, 0xc0]);
        assert_ne!(config.u16_at(STATUS) & STATUS_CAPABILITIES, 0);
        let mut found = Vec::new();
        let mut at = config.bytes[CAPABILITIES];
        while at != 0 {
            found.push((usize::from(at), config.bytes[usize::from(at)]));
            at = config.bytes[usize::from(at) + 1];
        }
        assert_eq!(found, [(first, 9), (second, 0x11)]);
        assert_eq!((first, second), (0x40, 0x48));
        config.write(second, &[0xff; 12]);
        assert_eq!(config.bytes[second..second + 12], [0x11, 0, 4, 0xc4, 4, 4, 4, 4, 4, 4, 4, 4]);
    }

    #[test]
    fn an_access_of_any_width_and_alignment_is_one_to_each_byte() {
        let mut config = config();
        let mut all = [0; 8];
        config.read(VENDOR, &mut all);
        for register in 0..8 {
            for width in [1, 2, 4, 8] {
                let mut data = [0xee; 8];
                config.read(register, &mut data[..width]);
                let end = all.len().min(register + width);
                assert_eq!(data[..end - register], all[register..end], "{width} bytes at {register}");
            }
        }
        config.write(INTERRUPT_LINE - 1, &[0xaa, 0xbb, 0xcc]);
        assert_eq!(read32(&config, INTERRUPT_LINE), 0xbb);
        let mut end = [0; 8];
        config.read(SPACE - 4, &mut end);
        assert_eq!(end, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn hostile_writes_change_nothing_but_what_may_be_written() {
        let mut config = config();
        config.add_capability(9, &[1; 30], &[]);
        let before = config.bytes;
        for register in 0..SPACE + 8 {
            for value in [0, 0xff] {
                config.write(register, &[value; 8]);
            }
        }
        config.write(usize::MAX, &[0xff; 8]);
        let read_only = |bytes: &[u8; USED]| -> Vec<u8> {
            bytes.iter().zip(&config.writable).map(|(byte, writable)| byte & !writable).collect()
        };
        assert_eq!(read_only(&config.bytes), read_only(&before));
    }
}
