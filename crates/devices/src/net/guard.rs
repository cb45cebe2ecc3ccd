//! Anti-spoofing: which frames a guest may send.
//!
//! A frame passes if it comes from the card's MAC address and, where the guest's IP addresses are known, is ARP or IP
//! that claims no other. What is looked at is a copy of the frame's beginning, and the copy is what is sent, since the
//! guest can change its memory between the look and the sending. A guest can also ask for a checksum to be written into
//! the frame (section 5.1.6.2): only behind everything that was looked at.
//!
//! Left out on purpose: VLAN tags, which do not pass where IP addresses are known; and what is inside of tunnels.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{HEADER, Mac};

/// How much of a frame is looked at: the Ethernet and IPv6 headers, and the part of a neighbour advertisement that
/// names an address.
pub(super) const LOOKED_AT: usize = ETHERNET + 40 + 24;
const ETHERNET: usize = 14;

/// VIRTIO_NET_HDR_F_NEEDS_CSUM (section 5.1.6).
const NEEDS_CSUM: u8 = 1;

const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const UDP: u8 = 17;
/// IPv6's next headers: hop-by-hop options, routing, ICMPv6, destination options.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const ICMPV6: u8 = 58;
const DESTINATION: u8 = 60;
/// ICMPv6: who has heard of which multicast groups (RFC 2710, RFC 3810).
const MULTICAST_LISTENER: [u8; 4] = [130, 131, 132, 143];
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Router advertisements and redirects, which are a router's to send.
const ROUTERS: [u8; 2] = [134, 137];

/// What a card's guest may say that it is.
pub(super) struct Guard {
    mac: [u8; 6],
    /// Empty if any will do.
    addresses: Vec<IpAddr>,
}

impl Guard {
    pub(super) fn new(mac: Mac, addresses: &[IpAddr]) -> Self {
        Self { mac: mac.bytes(), addresses: addresses.to_vec() }
    }

    /// Whether a frame passes that begins with these bytes: the virtio header, then at most [`LOOKED_AT`] of the frame.
    pub(super) fn passes(&self, start: &[u8]) -> bool {
        let Some((header, frame)) = start.split_at_checked(HEADER) else { return false };
        self.checked(frame).is_some_and(|checked| {
            // The place of the checksum is csum_start plus an offset that cannot be negative.
            let csum_start = usize::from(u16::from_le_bytes([header[6], header[7]]));
            frame.len() >= checked && (header[0] & NEEDS_CSUM == 0 || csum_start >= checked)
        })
    }

    /// How many bytes of the frame an answer rests on; `None` if it does not pass.
    fn checked(&self, frame: &[u8]) -> Option<usize> {
        if field::<6>(frame, 6)? != self.mac {
            return None;
        }
        let kind = u16::from_be_bytes(field(frame, 12)?);
        if self.addresses.is_empty() {
            return match kind {
                ARP => self.arp(frame),
                _ => Some(ETHERNET),
            };
        }
        match kind {
            ARP => self.arp(frame),
            IPV4 => self.ipv4(frame),
            IPV6 => self.ipv6(frame),
            _ => None,
        }
    }

    /// RFC 826: the sender of an answer or a request, which a neighbour learns from either.
    fn arp(&self, frame: &[u8]) -> Option<usize> {
        const ETHERNET_AND_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
        let sender = Ipv4Addr::from(field::<4>(frame, 28)?);
        let ours = field::<6>(frame, 14)? == ETHERNET_AND_IPV4 && field::<6>(frame, 22)? == self.mac;
        // A probe (RFC 5227) has no sender yet.
        (ours && (sender.is_unspecified() || self.owns(sender.into()))).then_some(42)
    }

    fn ipv4(&self, frame: &[u8]) -> Option<usize> {
        let source = Ipv4Addr::from(field::<4>(frame, 26)?);
        let target = Ipv4Addr::from(field::<4>(frame, 30)?);
        let [protocol] = field(frame, 23)?;
        // Who asks for an address (DHCP) has none.
        let asks = source.is_unspecified() && target.is_broadcast() && protocol == UDP;
        (asks || self.owns(source.into())).then_some(34)
    }

    fn ipv6(&self, frame: &[u8]) -> Option<usize> {
        let source = Ipv6Addr::from(field::<16>(frame, 22)?);
        if !source.is_unspecified() && !self.owns(source.into()) {
            return None;
        }
        let [next] = field(frame, 20)?;
        match next {
            ICMPV6 => {
                let [kind] = field(frame, 54)?;
                if kind == NEIGHBOUR_ADVERTISEMENT {
                    // The link-layer address that may follow is not looked at: neighbours learn it for this address only.
                    return self.owns(Ipv6Addr::from(field::<16>(frame, 62)?).into()).then_some(LOOKED_AT);
                }
                (!ROUTERS.contains(&kind)).then_some(55)
            }
            // The options of eight bytes that go with multicast groups; behind any others could be what was refused above.
            HOP_BY_HOP => {
                let ([after, length], [kind]) = (field::<2>(frame, 54)?, field(frame, 62)?);
                (after == ICMPV6 && length == 0 && MULTICAST_LISTENER.contains(&kind)).then_some(63)
            }
            ROUTING | DESTINATION => None,
            _ => Some(54),
        }
    }

    fn owns(&self, address: IpAddr) -> bool {
        self.addresses.is_empty()
            || self.addresses.contains(&address)
            || (address == IpAddr::V6(self.link_local()) && self.addresses.iter().any(IpAddr::is_ipv6))
    }

    /// The address that goes with the MAC address (RFC 4291, appendix A).
    fn link_local(&self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.mac;
        Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
    }
}

fn field<const N: usize>(frame: &[u8], offset: usize) -> Option<[u8; N]> {
    frame.get(offset..offset + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OURS: [u8; 4] = [10, 0, 0, 2];

    fn guard(addresses: &[&str]) -> Guard {
        let addresses: Vec<_> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        Guard::new("02:00:00:00:00:01".parse().unwrap(), &addresses)
    }

    fn frame(source: [u8; 6], kind: u16, rest: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; HEADER];
        frame.extend([0xff; 6]);
        frame.extend(source);
        frame.extend(kind.to_be_bytes());
        frame.extend(rest);
        frame
    }

    fn ipv4(source: [u8; 4], target: [u8; 4], protocol: u8) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, protocol, 0, 0];
        packet.extend(source);
        packet.extend(target);
        packet.extend([0; 8]);
        frame(MAC, IPV4, &packet)
    }

    fn arp(hardware: [u8; 6], sender: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 2];
        packet.extend(hardware);
        packet.extend(sender);
        packet.extend([0; 10]);
        frame(MAC, ARP, &packet)
    }

    fn ipv6(source: &str, next: u8, rest: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 255];
        packet.extend(source.parse::<Ipv6Addr>().unwrap().octets());
        packet.extend([0xff; 16]);
        packet.extend(rest);
        frame(MAC, IPV6, &packet)
    }

    #[test]
    fn a_frame_from_another_mac_does_not_pass() {
        let mut other = MAC;
        other[5] ^= 1;
        for guard in [guard(&[]), guard(&["10.0.0.2"])] {
            assert!(guard.passes(&ipv4(OURS, [1; 4], 6)));
            assert!(!guard.passes(&frame(other, IPV4, &ipv4(OURS, [1; 4], 6)[HEADER + 14..])));
            assert!(guard.passes(&arp(MAC, OURS)));
            assert!(!guard.passes(&arp(other, OURS)), "the one inside of the packet counts, too");
        }
    }

    #[test]
    fn an_address_of_somebody_else_passes_only_where_none_is_known() {
        let known = guard(&["10.0.0.2"]);
        for frame in [ipv4([10, 0, 0, 3], [1; 4], 6), arp(MAC, [10, 0, 0, 1]), ipv6("fd00::2", 6, &[0; 20])] {
            assert!(!known.passes(&frame));
            assert!(guard(&[]).passes(&frame));
        }
        assert!(!known.passes(&frame(MAC, 0x8100, &[0; 60])), "a tag can hide an address");
        assert!(guard(&[]).passes(&frame(MAC, 0x88cc, &[0; 60])));
    }

    #[test]
    fn who_has_no_address_yet_may_ask_for_one() {
        let guard = guard(&["10.0.0.2", "fd00::2"]);
        assert!(guard.passes(&ipv4([0; 4], [255; 4], UDP)));
        assert!(!guard.passes(&ipv4([0; 4], [10, 0, 0, 1], UDP)));
        assert!(guard.passes(&arp(MAC, [0; 4])));
        assert!(guard.passes(&ipv6("::", ICMPV6, &[135; 24])));
    }

    #[test]
    fn a_neighbour_advertisement_speaks_for_its_sender_alone() {
        let guard = guard(&["fd00::2"]);
        let advertisement = |target: &str| {
            let mut packet = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, 0, 0, 0, 0];
            packet.extend(target.parse::<Ipv6Addr>().unwrap().octets());
            packet
        };
        for source in ["fd00::2", "fe80::ff:fe00:1"] {
            assert!(guard.passes(&ipv6(source, ICMPV6, &advertisement("fd00::2"))), "{source}");
            assert!(!guard.passes(&ipv6(source, ICMPV6, &advertisement("fd00::1"))));
            assert!(!guard.passes(&ipv6(source, ICMPV6, &advertisement("fd00::2")[..20])));
        }
        assert!(!guard.passes(&ipv6("fe80::2", ICMPV6, &advertisement("fd00::2"))));
        let hidden = [&[ICMPV6, 0, 0, 0, 0, 0, 0, 0], &advertisement("fd00::1")[..]].concat();
        for next in [HOP_BY_HOP, DESTINATION, ROUTING] {
            assert!(!guard.passes(&ipv6("fd00::2", next, &hidden)), "{next}");
        }
        let report = [&[ICMPV6, 0, 5, 2, 0, 0, 1, 0], &[143; 16][..]].concat();
        assert!(guard.passes(&ipv6("fd00::2", HOP_BY_HOP, &report)));
        assert!(!guard.passes(&ipv6("fd00::2", ICMPV6, &[134; 24])), "the guest is no router");
    }

    #[test]
    fn a_checksum_is_not_written_into_what_was_looked_at() {
        let guard = guard(&["10.0.0.2"]);
        let mut frame = ipv4(OURS, [1; 4], UDP);
        frame[0] = NEEDS_CSUM;
        for (start, passes) in [(0u16, false), (26, false), (33, false), (34, true), (u16::MAX, true)] {
            frame[6..8].copy_from_slice(&start.to_le_bytes());
            assert_eq!(guard.passes(&frame), passes, "{start}");
        }
    }

    #[test]
    fn a_frame_that_ends_too_early_does_not_pass() {
        let guard = guard(&["10.0.0.2", "fd00::2"]);
        for (frame, whole) in [(ipv4(OURS, [1; 4], 6), 34), (arp(MAC, OURS), 42), (ipv6("fd00::2", 6, &[0; 20]), 54)] {
            for length in 0..frame.len() {
                assert_eq!(guard.passes(&frame[..length]), length >= HEADER + whole, "{length}");
            }
        }
    }
}
