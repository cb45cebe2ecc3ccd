//! What the driver asks for, checked (VIRTIO 1.2, section 5.2.6).
//!
//! Left out on purpose: lifetime, zoned and secure-erase requests, which are not offered, and more than one range in a
//! discard, which the configuration space says.

use virtio::{Chain, GuestFault};

use super::job::{Job, MOST_BUFFERS, MOST_ZEROS, Op};
use super::spec::SERIAL_LENGTH;

/// Bytes of a sector, whatever the logical block is (section 5.2.4).
pub(super) const SECTOR: u64 = 512;
/// The longest range of one discard or write-zeroes request, in sectors: what can be written as zeros at once, where
/// the host knows no better.
#[allow(clippy::cast_possible_truncation, reason = "64 Ki sectors, and constants cannot be converted otherwise")]
pub(super) const MOST_SECTORS: u32 = (MOST_ZEROS / SECTOR) as u32;

/// Bytes of the header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of one range of a discard or write-zeroes request: sector, number, flags.
const RANGE: usize = 16;
/// The range may be deallocated.
const FLAG_UNMAP: u32 = 1;

/// The longest read or write, in bytes. Drivers stay far below it (Linux: 4 MiB unless told otherwise); chains whose
/// descriptors name the same memory many times could ask for gigabytes, and a reset has to wait for them.
pub(super) const MOST_BYTES: usize = 64 << 20;

/// The status byte.
pub(super) type Status = u8;
/// VIRTIO_BLK_S_OK.
pub(super) const OK: Status = 0;
/// VIRTIO_BLK_S_IOERR.
pub(super) const IOERR: Status = 1;
/// VIRTIO_BLK_S_UNSUPP.
pub(super) const UNSUPP: Status = 2;

/// What a request may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules<'a> {
    /// Bytes of the disk.
    pub(super) capacity: u64,
    pub(super) writable: bool,
    /// A write is to be on the disk when it is done, as the driver cannot flush (section 5.2.6.2).
    pub(super) write_through: bool,
    /// Flushes do nothing.
    pub(super) ignore_flush: bool,
    /// What the driver may use of what is offered.
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
    pub(super) serial: &'a str,
}

/// Reads the request in `chain`: either there is a job, in `job`, or the status that it ends with at once.
///
/// # Errors
///
/// There is no room for the status.
pub(super) fn parse(chain: &mut Chain, rules: &Rules<'_>, job: &mut Job) -> Result<Option<Status>, GuestFault> {
    let Some(room) = chain.writable_len().checked_sub(1) else {
        return Err(GuestFault::new("a request has no room for its status"));
    };
    let mut header = [0; HEADER];
    if chain.readable_len() < HEADER {
        return Ok(Some(IOERR));
    }
    chain.read_at(0, &mut header)?;
    let [kind, _, low, high] = words(&header);
    let sector = u64::from(high) << 32 | u64::from(low);
    let payload = chain.readable_len() - HEADER;
    match kind {
        0 if room > MOST_BYTES => return Ok(Some(IOERR)),
        1 if payload > MOST_BYTES => return Ok(Some(IOERR)),
        // VIRTIO_BLK_T_IN
        0 => {
            let Some(offset) = range(sector, room as u64, rules) else { return Ok(Some(IOERR)) };
            job.set(Op::Read, offset, room as u64);
            job.extend(chain.writable_range(0..room)?.iter().map(buffer));
        }
        // VIRTIO_BLK_T_OUT
        1 => {
            let offset = range(sector, payload as u64, rules).filter(|_| rules.writable);
            let Some(offset) = offset else { return Ok(Some(IOERR)) };
            job.set(if rules.write_through { Op::WriteThrough } else { Op::Write }, offset, payload as u64);
            job.extend(chain.readable_range(HEADER..HEADER + payload)?.iter().map(buffer));
        }
        // VIRTIO_BLK_T_FLUSH
        4 if rules.ignore_flush || !rules.writable => return Ok(Some(OK)),
        4 => {
            job.set(Op::Flush, 0, 0);
            return Ok(None);
        }
        // VIRTIO_BLK_T_GET_ID
        8 => return get_id(chain, room, rules.serial).map(Some),
        // VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES
        11 if rules.discard => return zeroes(chain, payload, false, rules, job),
        13 if rules.write_zeroes => return zeroes(chain, payload, true, rules, job),
        _ => return Ok(Some(UNSUPP)),
    }
    // An empty request is done as soon as it is seen; one in more pieces than a system call takes breaks `seg_max`.
    Ok(match job.buffers().len() {
        0 => Some(OK),
        1..=MOST_BUFFERS => None,
        _ => Some(IOERR),
    })
}

/// Where in the image a range begins, in bytes, if it lies in the disk and is in whole sectors.
fn range(sector: u64, length: u64, rules: &Rules<'_>) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    let inside = offset.checked_add(length)? <= rules.capacity;
    (inside && length.is_multiple_of(SECTOR)).then_some(offset)
}

fn get_id(chain: &mut Chain, room: usize, serial: &str) -> Result<Status, GuestFault> {
    let mut id = [0; SERIAL_LENGTH];
    id[..serial.len()].copy_from_slice(serial.as_bytes());
    chain.write_at(0, &id[..room.min(SERIAL_LENGTH)])?;
    Ok(OK)
}

fn zeroes(
    chain: &Chain,
    payload: usize,
    write: bool,
    rules: &Rules<'_>,
    job: &mut Job,
) -> Result<Option<Status>, GuestFault> {
    if payload != RANGE || !rules.writable {
        return Ok(Some(IOERR));
    }
    let mut segment = [0; RANGE];
    chain.read_at(HEADER, &mut segment)?;
    let [low, high, sectors, flags] = words(&segment);
    // Section 5.2.6.2: flags that are unknown, and unmap in a discard, are not supported.
    if flags & !FLAG_UNMAP != 0 || (flags != 0 && !write) {
        return Ok(Some(UNSUPP));
    }
    let length = u64::from(sectors) * SECTOR;
    let offset = range(u64::from(high) << 32 | u64::from(low), length, rules);
    let Some(offset) = offset.filter(|_| sectors <= MOST_SECTORS) else { return Ok(Some(IOERR)) };
    if length == 0 {
        return Ok(Some(OK));
    }
    let op = match (write, flags) {
        (false, _) => Op::Discard,
        (true, FLAG_UNMAP) => Op::Punch,
        (true, _) => Op::Zero,
    };
    job.set(op, offset, length);
    Ok(None)
}

fn buffer(piece: &virtio::IoVec) -> libc::iovec {
    libc::iovec { iov_base: piece.address().cast(), iov_len: piece.len() }
}

/// Four little-endian words.
fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks::<4>();
    std::array::from_fn(|at| u32::from_le_bytes(words[at]))
}
