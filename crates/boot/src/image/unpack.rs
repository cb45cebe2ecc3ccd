//! Unpacks the compressed kernel inside a bzImage, in any of the seven formats that Linux' `lib/decompress.c` knows.
//!
//! The image is not trusted. The last four bytes of the payload say how long the unpacked kernel is (in gzip they are
//! the format's own, behind the others the kernel's build puts them); a decoder gets exactly so much memory, and a
//! kernel that turns out longer or shorter is refused. What a decoder itself allocates is bounded too.

use std::io::{self, Read};

use super::elf::KERNEL_IMAGE_SIZE;
use super::error::ImageFault;
use super::lzop;
use super::source::Buffer;

/// Blocks of the legacy lz4 format unpack to at most so much.
const LZ4_BLOCK: usize = 8 << 20;
/// Linux unpacks zstd with windows of up to 128 MiB, and its build uses them.
const MAX_WINDOW: usize = 128 << 20;
/// The memory that xz and lzma may ask for, in KiB: a dictionary of 128 MiB and the tables.
const MAX_LZMA_KIB: u32 = 160 << 10;

/// How a kernel is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lz4,
    Zstd,
    Lzo,
}

impl Format {
    /// Tells the format by the payload's first bytes; `None` leaves the unpacking to the kernel itself.
    pub(crate) fn detect(payload: &[u8]) -> Option<Self> {
        let formats: [(&[u8], Self); 7] = [
            (&[0x1f, 0x8b], Self::Gzip),
            (b"BZh", Self::Bzip2),
            (&[0x5d, 0, 0], Self::Lzma),
            (b"\xfd7zXZ\0", Self::Xz),
            (&[0x02, 0x21, 0x4c, 0x18], Self::Lz4),
            (&[0x28, 0xb5, 0x2f, 0xfd], Self::Zstd),
            (lzop::MAGIC, Self::Lzo),
        ];
        formats.into_iter().find(|(magic, _)| payload.starts_with(magic)).map(|(_, format)| format)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
            Self::Xz => "xz",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Lzo => "lzo",
        }
    }
}

/// Why a decoder stopped.
pub(crate) enum Stop {
    /// There is more than the memory for it.
    Overlong,
    /// The stream is damaged.
    Damaged(String),
}

impl Stop {
    pub(crate) fn damaged(reason: impl Into<String>) -> Self {
        Self::Damaged(reason.into())
    }
}

/// Unpacks a whole payload, with the size behind it.
pub(crate) fn unpack(format: Format, payload: &[u8]) -> Result<Buffer, ImageFault> {
    let damaged = |reason: String| ImageFault::Damaged { format: format.name(), reason };
    let (stream, size) = payload.split_last_chunk::<4>().ok_or_else(|| damaged("it has no size".into()))?;
    let stream = if format == Format::Gzip { payload } else { stream };
    let size = u64::from(u32::from_le_bytes(*size));
    if size > KERNEL_IMAGE_SIZE {
        return Err(ImageFault::Oversized(size));
    }
    let size = usize::try_from(size).map_err(|_| ImageFault::Oversized(size))?;
    if size == 0 {
        return Err(damaged("it announces no bytes".into()));
    }
    let mut buffer = Buffer::new(size)?;
    match decode(format, stream, buffer.as_mut_slice()) {
        Ok(written) if written == size => Ok(buffer),
        Ok(written) => Err(damaged(format!("it ends after {written} of {size} bytes"))),
        Err(Stop::Overlong) => Err(ImageFault::Overlong(size)),
        Err(Stop::Damaged(reason)) => Err(damaged(reason)),
    }
}

fn decode(format: Format, stream: &[u8], out: &mut [u8]) -> Result<usize, Stop> {
    match format {
        Format::Gzip => fill(flate2::read::GzDecoder::new(stream), out),
        Format::Bzip2 => fill(bzip2::read::BzDecoder::new(stream), out),
        Format::Xz => fill(lzma_rust2::XzReader::new_mem_limit(stream, false, MAX_LZMA_KIB), out),
        Format::Lzma => {
            let reader = lzma_rust2::LzmaReader::new_mem_limit(stream, MAX_LZMA_KIB, None)
                .map_err(|e| Stop::damaged(e.to_string()))?;
            fill(reader, out)
        }
        Format::Lz4 => lz4(stream, out),
        Format::Zstd => zstd(stream, out),
        Format::Lzo => lzop::unpack(stream, out),
    }
}

/// Reads until `out` is full, and then makes sure that nothing follows: only so are the check sums at the end seen.
fn fill(mut reader: impl Read, out: &mut [u8]) -> Result<usize, Stop> {
    let mut written = 0;
    loop {
        let mut extra = [0];
        let target = if written < out.len() { &mut out[written..] } else { &mut extra[..] };
        match reader.read(target) {
            Ok(0) => return Ok(written),
            Ok(_) if written == out.len() => return Err(Stop::Overlong),
            Ok(count) => written += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Stop::damaged(e.to_string())),
        }
    }
}

/// The legacy lz4 format: a magic number, then blocks, each led by its length.
fn lz4(stream: &[u8], out: &mut [u8]) -> Result<usize, Stop> {
    let mut written = 0;
    let mut rest = &stream[4..];
    while let Some((len, body)) = rest.split_first_chunk::<4>() {
        let len = u32::from_le_bytes(*len) as usize;
        let (block, after) = body.split_at_checked(len).ok_or_else(|| Stop::damaged("a block is cut off"))?;
        let room = out.len() - written;
        let target = &mut out[written..written + room.min(LZ4_BLOCK)];
        written += lz4_flex::block::decompress_into(block, target).map_err(|e| match e {
            lz4_flex::block::DecompressError::OutputTooSmall { .. } if room < LZ4_BLOCK => Stop::Overlong,
            e => Stop::damaged(e.to_string()),
        })?;
        rest = after;
    }
    if rest.is_empty() { Ok(written) } else { Err(Stop::damaged("a block is cut off")) }
}

fn zstd(stream: &[u8], out: &mut [u8]) -> Result<usize, Stop> {
    use ruzstd::decoding::errors::FrameDecoderError;
    let mut decoder = ruzstd::decoding::FrameDecoder::new();
    decoder.set_max_window_size(out.len().max(MAX_WINDOW) as u64);
    let written = decoder.decode_all(stream, out).map_err(|e| match e {
        FrameDecoderError::TargetTooSmall => Stop::Overlong,
        e => Stop::damaged(e.to_string()),
    })?;
    match decoder.get_checksum_from_data() {
        Some(sum) if decoder.get_calculated_checksum() != Some(sum) => Err(Stop::damaged("its check sum is wrong")),
        _ => Ok(written),
    }
}
