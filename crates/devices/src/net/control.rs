//! Which queues there are (VIRTIO 1.2, section 5.1.2), and the control queue (section 5.1.6.5), on which a driver says how
//! many pairs it uses, and nothing else.

use virtio::{Active, GuestFault, VirtQueue};

use super::feature;

/// VIRTIO_NET_CTRL_MQ and VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
const PAIRS_SET: [u8; 2] = [4, 0];
/// VIRTIO_NET_OK and VIRTIO_NET_ERR.
const OK: u8 = 0;
const ERR: u8 = 1;

/// What the driver has enabled.
pub(super) struct Queues {
    /// Receive and transmit queue of each pair, from the first on without a gap.
    pub(super) pairs: Vec<(VirtQueue, VirtQueue)>,
    pub(super) control: Option<Control>,
}

impl Queues {
    /// Sorts the queues of a device with `pairs` pairs. The first pair must be there; of the others as many are used as
    /// the driver has enabled both queues of.
    pub(super) fn take(active: &mut Active, pairs: usize) -> Result<Self, GuestFault> {
        let control = Control::take(active, pairs)?;
        let mut queues = Self { pairs: vec![(active.take(0)?, active.take(1)?)], control };
        for index in (2..).step_by(2).take(pairs - 1) {
            let (Ok(rx), Ok(tx)) = (active.take(index), active.take(index + 1)) else { break };
            queues.pairs.push((rx, tx));
        }
        Ok(queues)
    }
}

pub(super) struct Control(VirtQueue);

impl Control {
    /// The control queue of a device with `pairs` pairs, if the driver has enabled it. Without VIRTIO_NET_F_MQ it comes
    /// after the first pair (section 5.1.2).
    fn take(active: &mut Active, pairs: usize) -> Result<Option<Self>, GuestFault> {
        if !active.has(feature::CTRL_VQ) {
            return Ok(None);
        }
        let pairs = if active.has(feature::MQ) { pairs } else { 1 };
        let index = u16::try_from(2 * pairs).unwrap_or(u16::MAX);
        active.take(index).map(|queue| Some(Self(queue)))
    }

    pub(super) fn queue(&self) -> &VirtQueue {
        &self.0
    }

    pub(super) fn into_queue(self) -> VirtQueue {
        self.0
    }

    /// Answers the driver. Returns how many pairs it uses from now on, if it has said so; at most `most`.
    pub(super) fn serve(&mut self, most: usize) -> Result<Option<usize>, GuestFault> {
        let Self(queue) = self;
        let mut pairs = None;
        queue.kicked();
        while let Some(mut chain) = queue.pop()? {
            let mut command = [0; 4];
            let asked = if chain.readable_len() == command.len() {
                chain.read_at(0, &mut command)?;
                Some(usize::from(u16::from_le_bytes([command[2], command[3]])))
            } else {
                None
            };
            let asked = asked.filter(|asked| command[..2] == PAIRS_SET && (1..=most).contains(asked));
            pairs = asked.or(pairs);
            chain.write_at(0, &[if asked.is_some() { OK } else { ERR }])?;
            queue.push(chain, 1);
        }
        queue.signal();
        Ok(pairs)
    }
}
