//! ELF files made by hand (System V ABI, chapters 4 and 5), right and wrong ones.

/// One loadable segment.
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    /// The guest-physical address.
    pub(crate) address: u64,
    /// Bytes in the file.
    pub(crate) in_file: u64,
    /// Bytes in memory.
    pub(crate) in_memory: u64,
}

/// An executable for a machine.
pub(crate) struct Elf<'a> {
    /// 1 for 32 bits, 2 for 64.
    pub(crate) class: u8,
    /// The entry's address.
    pub(crate) entry: u64,
    /// They all start at the start of `content`.
    pub(crate) segments: &'a [Segment],
    /// What the segments hold.
    pub(crate) content: &'a [u8],
    /// What stands behind the ELF file, where a Linux kernel has its relocations.
    pub(crate) behind: &'a [u8],
}

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const X86_64: u16 = 62;
const EXECUTABLE: u16 = 2;
const LOAD: u32 = 1;

impl Elf<'_> {
    /// The file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let offset = HEADER + PROGRAM_HEADER * self.segments.len();
        let mut file = vec![0x7f, b'E', b'L', b'F', self.class, 1, 1];
        file.resize(16, 0);
        file.extend(EXECUTABLE.to_le_bytes());
        file.extend(X86_64.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        file.extend(self.entry.to_le_bytes());
        file.extend((HEADER as u64).to_le_bytes());
        // No sections, no flags.
        file.extend([0; 12]);
        for half in [HEADER, PROGRAM_HEADER, self.segments.len(), 0, 0, 0] {
            file.extend(u16::try_from(half).expect("a small number").to_le_bytes());
        }
        for segment in self.segments {
            file.extend(LOAD.to_le_bytes());
            file.extend(7u32.to_le_bytes());
            for word in [offset as u64, segment.address, segment.address, segment.in_file, segment.in_memory, 4096] {
                file.extend(word.to_le_bytes());
            }
        }
        file.extend(self.content);
        file.extend(self.behind);
        file
    }
}
