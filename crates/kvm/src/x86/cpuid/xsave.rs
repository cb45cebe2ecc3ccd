//! Leaf 0xD: which registers XSAVE keeps, and in how many bytes (Intel SDM volume 1, chapter 13).
//!
//! A component of the state and the feature that owns it come and go together: a guest enables in XCR0 what this leaf
//! offers, and faults if KVM then refuses it. KVM keeps the guest to XCR0 as this leaf says.

use super::Leaves;
use super::features::Capabilities;
use super::table::{Feature, at};

const LEAF: u32 = 0xd;
/// The legacy area and the header: what XSAVE takes when no other component is enabled.
const SMALLEST: u32 = 512 + 64;
/// ECX of a component's subleaf: it belongs to IA32_XSS, not to XCR0.
const SUPERVISOR: u32 = 1;

/// Components, as bits of XCR0 or IA32_XSS, and the features of which one at least must be there to want them.
/// Components that do not stand here are left as KVM offers them.
const OWNERS: &[(u64, &[Feature])] = &[
    (1 << 2, &[at("avx")]),
    (0b11 << 3, &[at("mpx")]),
    (0b111 << 5, &[at("avx512f")]),
    (1 << 9, &[at("pku")]),
    (0b11 << 11, &[at("user_shstk"), at("ibt")]),
    (0b11 << 17, &[at("amx_tile")]),
    (1 << 19, &[at("apx")]),
];

/// Clears the features whose registers KVM does not keep. It offers AMX, for one, even to a process that has not asked
/// the kernel for room for the tiles (ARCH_REQ_XCOMP_GUEST_PERM).
pub(super) fn clear_stateless(leaves: &Leaves, capabilities: &mut Capabilities) {
    let user = leaves.find(LEAF, 0).map_or(0, |leaf| pair(leaf.eax, leaf.edx));
    let supervisor = leaves.find(LEAF, 1).map_or(0, |leaf| pair(leaf.ecx, leaf.edx));
    for &(components, owners) in OWNERS {
        if (user | supervisor) & components != components {
            owners.iter().for_each(|&owner| capabilities.clear(owner));
        }
    }
}

/// Takes the components without an owner out of leaf 0xD, and computes its sizes anew.
pub(super) fn narrow(leaves: &mut Leaves, capabilities: &Capabilities) {
    if !capabilities.has(at("xsave")) {
        leaves.remove(LEAF);
        return;
    }
    let unwanted = OWNERS
        .iter()
        .filter(|(_, owners)| !owners.iter().any(|&owner| capabilities.has(owner)))
        .fold(0, |unwanted, (components, _)| unwanted | components);
    let xsaves = capabilities.has(at("xsaves"));
    leaves.0.retain(|entry| {
        let component = entry.function == LEAF && entry.index >= 2;
        let gone = unwanted.checked_shr(entry.index).is_some_and(|bits| bits & 1 == 1);
        !component || !gone && (xsaves || entry.ecx & SUPERVISOR == 0)
    });
    let largest = leaves
        .0
        .iter()
        .filter(|entry| entry.function == LEAF && entry.index >= 2 && entry.ecx & SUPERVISOR == 0)
        .map(|entry| entry.ebx.saturating_add(entry.eax))
        .fold(SMALLEST, u32::max);
    let [low, high] = halves(!unwanted);
    if let Some(leaf) = leaves.find_mut(LEAF, 0) {
        leaf.eax &= low;
        leaf.edx &= high;
        // The size for XCR0 as it is: x87 only, at reset. KVM follows the guest's writes from there.
        leaf.ebx = SMALLEST;
        leaf.ecx = largest;
    }
    if let Some(leaf) = leaves.find_mut(LEAF, 1) {
        let compacts = xsaves || capabilities.has(at("xsavec"));
        leaf.ebx = if compacts { SMALLEST } else { 0 };
        leaf.ecx &= if xsaves { low } else { 0 };
        leaf.edx &= if xsaves { high } else { 0 };
    }
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn halves(bits: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = bits.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}
