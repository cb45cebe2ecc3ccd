//! Blobs: what they are called, and how nothing but what that name says is ever made of them.
//!
//! Image specification 1.1, "Content Descriptors". Left out: digests other than SHA-256, which nobody makes.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek as _, Write as _};
use std::str::FromStr;

use anyhow::{Context as _, ensure};
use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use sha2::{Digest as _, Sha256};

/// What layers begin with that are packed (RFC 1952, 2.3.1 and RFC 8878, 3.1.1; the last byte of a skippable frame's
/// magic number comes first, and has sixteen values).
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const ZSTD_SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];

/// The SHA-256 of a blob.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// That of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// As hexadecimal digits.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl FromStr for Digest {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let digits = text.strip_prefix("sha256:").filter(|hex| hex.len() == 64 && hex.is_ascii());
        let bytes = digits.and_then(|hex| {
            let mut bytes = [0; 32];
            for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
                let lower = digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
                *byte = u8::from_str_radix(std::str::from_utf8(digits).ok().filter(|_| lower)?, 16).ok()?;
            }
            Some(bytes)
        });
        bytes.map(Self).with_context(|| {
            let shown: String = text.chars().take(80).collect();
            format!("{shown:?} is no digest that is known here: sha256: and 64 digits are")
        })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A reader that knows what has been read.
pub struct Hashed<R> {
    inner: R,
    hash: Sha256,
    length: u64,
}

impl<R: Read> Hashed<R> {
    /// Nothing has been read.
    pub fn new(inner: R) -> Self {
        Self { inner, hash: Sha256::new(), length: 0 }
    }

    /// Reads the rest. Returns the digest and the length of the whole.
    fn finish(mut self) -> io::Result<(Digest, u64)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((Digest(self.hash.finalize().into()), self.length))
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hash.update(&buffer[..read]);
        self.length += read as u64;
        Ok(read)
    }
}

/// What is said of a blob before it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Its digest; a `docker save` archive says only what is in its layers.
    pub digest: Option<Digest>,
    /// How many bytes it has.
    pub size: u64,
}

impl Claim {
    /// Whether what has been read is what was said.
    fn check(&self, digest: Digest, size: u64) -> anyhow::Result<()> {
        ensure!(size == self.size, "it has {size} bytes where its descriptor says {}: fetch it again", self.size);
        let said = self.digest.unwrap_or(digest);
        ensure!(said == digest, "its digest is {digest} where {said} was said: fetch it again from whom you trust");
        Ok(())
    }
}

/// Reads all of a blob that has to be small.
///
/// # Errors
///
/// It has more than `most` bytes, or is not what was said of it.
pub fn read(blob: impl Read, claim: &Claim, most: u64) -> anyhow::Result<Vec<u8>> {
    ensure!(claim.size <= most, "its descriptor says {} bytes, and {most} are the most", claim.size);
    let mut bytes = Vec::new();
    blob.take(claim.size.saturating_add(1)).read_to_end(&mut bytes)?;
    claim.check(Digest::of(&bytes), bytes.len() as u64)?;
    Ok(bytes)
}

/// Unpacks a layer into `file`, which is `most` bytes long at the end at most. `content` is the digest of what is in it.
///
/// # Errors
///
/// The blob is not what was said of it, or cannot be unpacked, or has too much in it, or there is no room.
pub fn unpack(blob: impl Read, claim: &Claim, content: Digest, file: &File, most: u64) -> anyhow::Result<u64> {
    // A blob may be longer than was said, but no more than that is looked at.
    let blob = Hashed::new(blob.take(claim.size.saturating_add(1)));
    let mut blob = BufReader::with_capacity(256 << 10, blob);
    let mut sink = Sink { file: BufWriter::with_capacity(256 << 10, file), hash: Sha256::new(), length: 0, most };
    let start = blob.fill_buf()?;
    let unpacked = if start.starts_with(&GZIP) {
        sink.copy(&mut MultiGzDecoder::new(&mut blob))
    } else if start.starts_with(&ZSTD) || start.get(1..4) == Some(&ZSTD_SKIPPABLE) {
        unpack_zstd(&mut blob, &mut sink)
    } else {
        sink.copy(&mut blob)
    };
    // That a blob is damaged explains whatever else is wrong with it.
    if !matches!(&unpacked, Err(error) if error.is::<NoRoom>()) {
        let (digest, size) = { blob.into_inner() }.finish()?;
        claim.check(digest, size)?;
    }
    unpacked?;
    sink.file.flush().map_err(NoRoom)?;
    let found = Digest(sink.hash.finalize().into());
    ensure!(found == content, "what is in it has the digest {found} where the image's configuration says {content}");
    let mut file = file;
    file.rewind()?;
    Ok(sink.length)
}

/// One frame after the other; what some tools put between them is for themselves (RFC 8878, 3.1.2).
fn unpack_zstd(blob: &mut impl BufRead, sink: &mut Sink<'_>) -> anyhow::Result<()> {
    let mut decoder = FrameDecoder::new();
    while !blob.fill_buf()?.is_empty() {
        match decoder.reset(&mut *blob) {
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                let skipped = io::copy(&mut (&mut *blob).take(length.into()), &mut io::sink())?;
                ensure!(skipped == u64::from(length), "it is cut off");
                continue;
            }
            started => started.context("it cannot be unpacked")?,
        }
        while !decoder.is_finished() {
            let blocks = BlockDecodingStrategy::UptoBytes(1 << 20);
            decoder.decode_blocks(&mut *blob, blocks).context("it cannot be unpacked")?;
            sink.copy(&mut decoder)?;
        }
        sink.copy(&mut decoder)?;
    }
    Ok(())
}

/// The host's disk has no room, or fails otherwise.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to the cache: {0}")]
pub struct NoRoom(#[source] pub io::Error);

/// A file that may grow up to a limit.
struct Sink<'a> {
    file: BufWriter<&'a File>,
    hash: Sha256,
    length: u64,
    most: u64,
}

impl Sink<'_> {
    fn copy(&mut self, source: &mut impl Read) -> anyhow::Result<()> {
        let mut buffer = vec![0; 256 << 10];
        loop {
            let read = source.read(&mut buffer).context("it cannot be unpacked")?;
            if read == 0 {
                return Ok(());
            }
            self.length += read as u64;
            ensure!(
                self.length <= self.most,
                "it unpacks to more than the cache may hold: say VMM_IMAGE_CACHE=SIZE if you trust it"
            );
            self.hash.update(&buffer[..read]);
            self.file.write_all(&buffer[..read]).map_err(NoRoom)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    const TEXT: &[u8] = b"what is in a layer, and again: what is in a layer";

    fn claim(blob: &[u8]) -> Claim {
        Claim { digest: Some(Digest::of(blob)), size: blob.len() as u64 }
    }

    fn unpacked(blob: &[u8], claim: &Claim, most: u64) -> anyhow::Result<Vec<u8>> {
        let mut file = tempfile::tempfile().unwrap();
        unpack(blob, claim, Digest::of(TEXT), &file, most)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        Ok(bytes)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        compress_to_vec(bytes, CompressionLevel::Fastest)
    }

    #[test]
    fn a_layer_may_be_packed_in_several_pieces_or_not_at_all() {
        let (first, second) = TEXT.split_at(20);
        let skipped = [&[0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        for blob in [
            TEXT.to_vec(),
            gzip(TEXT),
            [gzip(first), gzip(second)].concat(),
            zstd(TEXT),
            [skipped.clone(), zstd(first), skipped, zstd(second)].concat(),
        ] {
            assert_eq!(unpacked(&blob, &claim(&blob), 1000).unwrap(), TEXT);
        }
    }

    #[test]
    fn a_blob_with_another_digest_or_size_is_refused_whatever_is_in_it() {
        for good in [TEXT.to_vec(), gzip(TEXT), zstd(TEXT)] {
            let mut flipped = good.clone();
            *flipped.last_mut().unwrap() ^= 1;
            let error = |blob: &[u8]| unpacked(blob, &claim(&good), 1000).unwrap_err().to_string();
            assert!(error(&flipped).contains("its digest is"), "{}", error(&flipped));
            assert!(error(&good[..good.len() - 1]).contains("bytes where its descriptor says"));
            assert!(error(&[&good[..], b"x"].concat()).contains("bytes where its descriptor says"));
        }
        assert!(read(TEXT, &claim(b"other"), 1000).is_err() && read(TEXT, &claim(TEXT), 10).is_err());
        assert_eq!(read(TEXT, &claim(TEXT), 1000).unwrap(), TEXT);
    }

    #[test]
    fn what_is_in_a_blob_has_to_be_what_the_configuration_says() {
        let other = gzip(b"something else");
        let error = unpacked(&other, &claim(&other), 1000).unwrap_err().to_string();
        assert!(error.contains("what is in it has the digest"), "{error}");
    }

    #[test]
    fn what_unpacks_to_more_than_there_may_be_is_refused() {
        for blob in [gzip(&[0; 1 << 20]), zstd(&[0; 1 << 20])] {
            let error = unpacked(&blob, &claim(&blob), 1 << 19).unwrap_err().to_string();
            assert!(error.contains("VMM_IMAGE_CACHE"), "{error}");
        }
    }

    #[test]
    fn only_sha256_in_lower_case_is_a_digest() {
        let good = Digest::of(b"").to_string();
        assert_eq!(good.parse::<Digest>().unwrap(), Digest::of(b""));
        for bad in
            ["", "sha256:", "sha512:00", &good[..70], &format!("{good}0"), &good.to_uppercase(), "sha256:../../x"]
        {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
        assert!(format!("sha256:{}", "+f".repeat(32)).parse::<Digest>().is_err());
    }
}
