//! The lzop container, in which a kernel's lzo payload stands: a header, then blocks of LZO1X, each with its two lengths
//! and check sums. As in Linux' `lib/decompress_unlzo.c`, check sums are not compared.

use super::unpack::Stop;

/// What the container starts with.
pub(crate) const MAGIC: &[u8] = b"\x89LZO\0\r\n\x1a\n";

/// The version from which the header has a level, a needed version and a time of 64 bits.
const VERSION_LEVEL: u16 = 0x0940;
const FLAG_ADLER32_UNPACKED: u32 = 0x1;
const FLAG_ADLER32_PACKED: u32 = 0x2;
const FLAG_EXTRA_FIELD: u32 = 0x40;
const FLAG_CRC32_UNPACKED: u32 = 0x100;
const FLAG_CRC32_PACKED: u32 = 0x200;
const FLAG_FILTER: u32 = 0x800;

/// Unpacks the container into `out` and returns how much it was.
pub(crate) fn unpack(stream: &[u8], out: &mut [u8]) -> Result<usize, Stop> {
    let mut input = Input(stream);
    let flags = header(&mut input).ok_or_else(|| Stop::damaged("its header is cut off"))?;
    let cut_off = || Stop::damaged("a block is cut off");
    let mut written = 0;
    loop {
        let unpacked_len = input.u32().ok_or_else(cut_off)? as usize;
        if unpacked_len == 0 {
            return Ok(written);
        }
        let packed_len = input.u32().ok_or_else(cut_off)? as usize;
        let sums = |all: u32| (flags & all).count_ones() as usize * 4;
        input.take(sums(FLAG_ADLER32_UNPACKED | FLAG_CRC32_UNPACKED)).ok_or_else(cut_off)?;
        if packed_len < unpacked_len {
            input.take(sums(FLAG_ADLER32_PACKED | FLAG_CRC32_PACKED)).ok_or_else(cut_off)?;
        }
        let block = input.take(packed_len).ok_or_else(cut_off)?;
        let target = out[written..].get_mut(..unpacked_len).ok_or(Stop::Overlong)?;
        if packed_len == unpacked_len {
            target.copy_from_slice(block);
        } else if lzo::decompress_into(block, target).map_err(|e| Stop::damaged(format!("{e:?}")))? != unpacked_len {
            return Err(Stop::damaged("a block is shorter than it says"));
        }
        written += unpacked_len;
    }
}

/// Reads the header and returns its flags.
fn header(input: &mut Input<'_>) -> Option<u32> {
    input.take(MAGIC.len())?;
    let version = input.u16()?;
    let with_level = version >= VERSION_LEVEL;
    // The library's version, the version needed, the method, the level.
    input.take(if with_level { 2 + 2 + 1 + 1 } else { 2 + 1 })?;
    let flags = input.u32()?;
    if flags & FLAG_FILTER != 0 {
        input.take(4)?;
    }
    // Mode and time.
    input.take(if with_level { 12 } else { 8 })?;
    let name_len = input.take(1)?[0];
    input.take(name_len.into())?;
    // The header's check sum.
    input.take(4)?;
    if flags & FLAG_EXTRA_FIELD != 0 {
        let len = input.u32()? as usize;
        input.take(len)?;
        input.take(4)?;
    }
    Some(flags)
}

/// Bytes that are read from the front; numbers are big-endian.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_be_bytes)
    }
}
