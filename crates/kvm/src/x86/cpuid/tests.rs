//! CPUID as two hosts' KVM offers it, in the leaves that matter here: an EPYC of family 17h (Rome) and a Xeon with
//! AVX-512, protection keys and AMX (Sapphire Rapids), the latter for a process that may use the tiles.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use super::table::WORDS;
use super::*;

type Row = (u32, u32, [u32; 4]);

const ROME: &[Row] = &[
    (0x0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
    (0x1, 0, [0x0083_0f10, 0x2b40_0800, 0x76f8_3203, 0x078b_fbff]),
    (0x5, 0, [0, 0, 0, 0]),
    (0x6, 0, [4, 0, 0, 0]),
    (0x7, 0, [0, 0x219c_01ab, 0x0040_0004, 0xac00_0000]),
    (0xb, 0, [0, 0, 0, 0x2b]),
    (0xd, 0, [0x7, 0x340, 0x340, 0]),
    (0xd, 1, [0xf, 0x340, 0, 0]),
    (0xd, 2, [0x100, 0x240, 0, 0]),
    (0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
    (0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
    (0x8000_0000, 0, [0x8000_0021, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
    (0x8000_0001, 0, [0x0083_0f10, 0x4000_0000, 0x0040_03f7, 0x2fd3_fbff]),
    (0x8000_0007, 0, [0, 0, 0, 0x100]),
    (0x8000_0008, 0, [0x3030, 0x0104_d205, 0x703f, 0]),
    (0x8000_000a, 0, [1, 8, 0, 0x0000_0009]),
    (0x8000_001d, 0, [0x4121, 0x01c0_003f, 0x3f, 0]),
    (0x8000_001d, 1, [0x4122, 0x01c0_003f, 0x3f, 0]),
    (0x8000_001d, 2, [0x4143, 0x01c0_003f, 0x3ff, 2]),
    (0x8000_001d, 3, [0x1_c163, 0x03c0_003f, 0x3fff, 1]),
    (0x8000_001d, 4, [0, 0, 0, 0]),
    (0x8000_001e, 0, [0, 0, 0, 0]),
    (0x8000_001f, 0, [0x2, 0x33, 0, 0]),
];

const SAPPHIRE: &[Row] = &[
    (0x0, 0, [0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
    (0x1, 0, [0x0008_06f8, 0x5c80_0800, 0x7ffa_3223, 0x0f8b_fbff]),
    (0x4, 0, [0xfc00_4121, 0x02c0_003f, 0x3f, 0]),
    (0x4, 1, [0xfc00_4122, 0x01c0_003f, 0x3f, 0]),
    (0x4, 2, [0xfc01_c143, 0x03c0_003f, 0x7ff, 0]),
    (0x4, 3, [0xfc1f_c163, 0x0380_003f, 0x1_bfff, 4]),
    (0x4, 4, [0, 0, 0, 0]),
    (0x6, 0, [4, 0, 0, 0]),
    (0x7, 0, [2, 0xf1bf_07af, 0x1a41_5f5e, 0xafd1_4410]),
    (0x7, 1, [0x0000_1c30, 0, 0, 0]),
    (0xd, 0, [0x6_02e7, 0x2b00, 0x2b00, 0]),
    (0xd, 1, [0x1f, 0x2900, 0, 0]),
    (0xd, 2, [0x100, 0x240, 0, 0]),
    (0xd, 5, [0x40, 0x440, 0, 0]),
    (0xd, 6, [0x200, 0x480, 0, 0]),
    (0xd, 7, [0x400, 0x680, 0, 0]),
    (0xd, 9, [0x8, 0xa80, 0, 0]),
    (0xd, 17, [0x40, 0xac0, 2, 0]),
    (0xd, 18, [0x2000, 0xb00, 6, 0]),
    (0x12, 0, [0x3, 0, 0, 0x241f]),
    (0x1d, 0, [1, 0, 0, 0]),
    (0x1d, 1, [0x0400_2000, 0x0008_0040, 0x10, 0]),
    (0x1e, 0, [0, 0x4010, 0, 0]),
    (0x1f, 0, [0, 0, 0, 0x5c]),
    (0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
    (0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
    (0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
    (0x8000_0008, 0, [0x3934, 0, 0, 0]),
];

fn entries(rows: &[Row]) -> Vec<kvm_cpuid_entry2> {
    let indexed = |leaf: u32| [0x4, 0x7, 0xb, 0xd, 0x1d, 0x1f, 0x8000_001d].contains(&leaf);
    rows.iter()
        .map(|&(function, index, [eax, ebx, ecx, edx])| {
            let flags = if indexed(function) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
            kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
        })
        .collect()
}

fn spec(vcpus: u8, features: &str) -> CpuidSpec {
    CpuidSpec {
        vcpus: NonZeroU8::new(vcpus).expect("at least one"),
        features: features.parse().expect("a mask"),
        tsc_deadline: true,
        tsc_khz: None,
    }
}

fn build(rows: &[Row], vcpus: u8, features: &str) -> Result<Template, CpuidError> {
    Template::new(&entries(rows), &spec(vcpus, features))
}

/// `[eax, ebx, ecx, edx]` as the guest reads it.
fn read(cpuid: &CpuId, leaf: u32, subleaf: u32) -> [u32; 4] {
    let entry = cpuid.as_slice().iter().find(|entry| entry.function == leaf && entry.index == subleaf);
    entry.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
}

fn first(rows: &[Row], features: &str) -> CpuId {
    build(rows, 1, features).expect("a template").for_vcpu(0)
}

/// Whether any bit of this name is set.
fn shows(cpuid: &CpuId, name: &str) -> bool {
    let leaves = Leaves(cpuid.as_slice().to_vec());
    features::named(name).any(|feature| features::Capabilities::read(&leaves).has(feature))
}

#[test]
fn every_count_of_processors_is_told_alike_by_all_leaves() {
    for (vcpus, core_bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (255, 8)] {
        let count = u32::from(vcpus);
        for rows in [ROME, SAPPHIRE] {
            let template = build(rows, vcpus, "").expect("a template");
            for index in [0, vcpus - 1] {
                let cpuid = template.for_vcpu(index);
                let id = u32::from(index);
                let [_, ebx, _, edx] = read(&cpuid, 1, 0);
                assert_eq!(ebx, id << 24 | count << 16 | 0x800);
                assert_eq!(edx & 1 << 28 != 0, vcpus > 1, "HTT");
                assert_eq!(read(&cpuid, 0xb, 0), [0, 1, 0x100, id]);
                assert_eq!(read(&cpuid, 0xb, 1), [core_bits, count, 0x201, id]);
            }
        }
    }
}

#[test]
fn on_amd_one_node_of_single_threaded_cores_shares_the_last_cache() {
    for (vcpus, nc, last_cache) in [(1, 0, 0x163), (2, 0x1001, 0x4163), (4, 0x2003, 0xc163), (255, 0x80fe, 0x3f_8163)] {
        let index = vcpus - 1;
        let cpuid = build(ROME, vcpus, "").expect("a template").for_vcpu(index);
        assert_eq!(read(&cpuid, 0x8000_0008, 0), [0x3030, 0x0104_d205, nc, 0]);
        assert_eq!(read(&cpuid, 0x8000_001e, 0), [u32::from(index), u32::from(index), 0, 0]);
        assert_eq!(read(&cpuid, 0x8000_001d, 0), [0x121, 0x01c0_003f, 0x3f, 0]);
        assert_eq!(read(&cpuid, 0x8000_001d, 2), [0x143, 0x01c0_003f, 0x3ff, 2]);
        assert_eq!(read(&cpuid, 0x8000_001d, 3), [last_cache, 0x03c0_003f, 0x3fff, 1]);
        assert_eq!(read(&cpuid, 0x8000_001d, 4), [0; 4]);
        assert_eq!(read(&cpuid, 0x8000_0001, 0)[2] & 2 != 0, vcpus > 1, "CmpLegacy");
        assert_eq!(read(&cpuid, 0x1f, 0), [0; 4], "beyond the highest leaf");
    }
}

#[test]
fn on_intel_the_caches_of_a_core_are_its_own_and_the_last_is_shared() {
    let samples = [(1, 0, 0x163), (2, 1, 0x0400_4163), (4, 3, 0x0c00_c163), (255, 254, 0xfc3f_8163)];
    for (vcpus, others, last_cache) in samples {
        let cpuid = build(SAPPHIRE, vcpus, "").expect("a template").for_vcpu(vcpus - 1);
        let cores = u32::min(others, 63) << 26;
        assert_eq!(read(&cpuid, 4, 0)[0], cores | 0x121);
        assert_eq!(read(&cpuid, 4, 2)[0], cores | 0x143);
        assert_eq!(read(&cpuid, 4, 3), [last_cache, 0x0380_003f, 0x1_bfff, 4]);
        assert_eq!(read(&cpuid, 4, 4), [0; 4]);
        assert_eq!(read(&cpuid, 0x1f, 0), read(&cpuid, 0xb, 0));
        assert_eq!(read(&cpuid, 0x1f, 1), read(&cpuid, 0xb, 1));
        assert_eq!(read(&cpuid, 0x8000_0008, 0)[2], 0);
        assert_eq!(read(&cpuid, 0x8000_0001, 0)[2] & 2, 0, "CmpLegacy");
        assert_eq!(read(&cpuid, 0x8000_001e, 0), [0; 4]);
    }
}

#[test]
fn a_processor_too_old_for_the_topology_leaf_gets_it() {
    let mut rows = entries(ROME);
    rows[0].eax = 7;
    let cpuid = Template::new(&rows, &spec(2, "")).expect("a template").for_vcpu(1);
    assert_eq!(read(&cpuid, 0, 0)[0], 0xb);
    assert_eq!(read(&cpuid, 0xb, 1), [1, 2, 0x201, 1]);
}

#[test]
fn without_topoext_its_leaves_are_gone() {
    let cpuid = first(ROME, "-topoext");
    assert!(!cpuid.as_slice().iter().any(|entry| [0x8000_001d, 0x8000_001e].contains(&entry.function)));
}

#[test]
fn the_deadline_timer_follows_its_capability() {
    for tsc_deadline in [true, false] {
        let asked = CpuidSpec { tsc_deadline, ..spec(1, "") };
        for shown in [true, false] {
            let mut rows = entries(ROME);
            rows[1].ecx = if shown { rows[1].ecx | 1 << 24 } else { rows[1].ecx & !(1 << 24) };
            let cpuid = Template::new(&rows, &asked).expect("a template").for_vcpu(0);
            assert_eq!(shows(&cpuid, "tsc_deadline_timer"), tsc_deadline);
        }
    }
}

#[test]
fn the_guest_is_told_of_the_hypervisor_and_its_frequencies() {
    let cpuid = first(ROME, "");
    assert!(shows(&cpuid, "hypervisor") && shows(&cpuid, "x2apic") && shows(&cpuid, "arat"));
    assert_eq!(read(&cpuid, 0x4000_0000, 0)[0], 0x4000_0001);
    assert_eq!(read(&cpuid, 0x4000_0001, 0), [0x0100_7efb, 0, 0, 0]);
    assert_eq!(read(&cpuid, 0x4000_0010, 0), [0; 4]);

    let known = CpuidSpec { tsc_khz: Some(2_445_406), ..spec(1, "") };
    let cpuid = Template::new(&entries(ROME), &known).expect("a template").for_vcpu(0);
    assert_eq!(read(&cpuid, 0x4000_0000, 0), [0x4000_0010, 0x4b4d_564b, 0x564b_4d56, 0x4d]);
    assert_eq!(read(&cpuid, 0x4000_0010, 0), [2_445_406, 1_000_000, 0, 0]);
}

#[test]
fn what_needs_the_vmm_is_hidden_and_nested_virtualisation_is_not() {
    let cpuid = first(SAPPHIRE, "");
    assert!(!shows(&cpuid, "sgx") && !shows(&cpuid, "sgx_lc"));
    assert_eq!(read(&cpuid, 0x12, 0), [0; 4]);
    assert!(shows(&cpuid, "vmx"));
    let cpuid = first(ROME, "");
    assert_eq!(read(&cpuid, 0x8000_001f, 0), [0; 4]);
    assert!(shows(&cpuid, "svm") && shows(&cpuid, "nrip_save"));
}

#[test]
fn a_removed_feature_takes_what_depends_on_it() {
    let cpuid = first(SAPPHIRE, "-avx");
    for name in ["avx", "avx2", "fma", "f16c", "vaes", "vpclmulqdq", "avx512f", "avx512vl", "avx512_vnni", "avx_vnni"] {
        assert!(shows(&first(SAPPHIRE, ""), name), "{name} is there to begin with");
        assert!(!shows(&cpuid, name), "{name}");
    }
    assert!(shows(&cpuid, "aes") && shows(&cpuid, "pku") && shows(&cpuid, "xsave"));

    let cpuid = first(ROME, "-svm");
    assert!(!cpuid.as_slice().iter().any(|entry| entry.function == 0x8000_000a));
}

#[test]
fn a_feature_with_a_bit_of_each_vendor_loses_both() {
    let cpuid = first(ROME, "-ibpb-ssbd");
    assert_eq!(read(&cpuid, 0x8000_0008, 0)[1], 0x0004_c205);
    assert_eq!(read(&cpuid, 7, 0)[3], 0x2800_0000);
    let cpuid = first(ROME, "-mmx");
    assert_eq!(read(&cpuid, 1, 0)[3] & 1 << 23, 0);
    assert_eq!(read(&cpuid, 0x8000_0001, 0)[3] & (1 << 22 | 1 << 23), 0);
}

#[test]
fn the_size_of_the_saved_state_follows_the_features() {
    let samples = [
        ("", 0x6_02e7, 11_008),
        ("-amx_tile", 0x2e7, 2_696),
        ("-xfd", 0x2e7, 2_696),
        ("-amx_tile-pku", 0xe7, 2_688),
        ("-amx_tile-avx512f", 0x207, 2_696),
        ("-amx_tile-pku-avx2", 0x7, 832),
        ("-amx_tile-pku-avx", 0x3, 576),
    ];
    for (mask, xcr0, largest) in samples {
        let cpuid = first(SAPPHIRE, mask);
        assert_eq!(read(&cpuid, 0xd, 0), [xcr0, 576, largest, 0], "{mask}");
        for component in 2..64 {
            let kept = xcr0.checked_shr(component).is_some_and(|bits: u32| bits & 1 == 1);
            assert_eq!(read(&cpuid, 0xd, component) != [0; 4], kept, "{mask}: component {component}");
        }
    }
    assert_eq!(read(&first(ROME, ""), 0xd, 1), [0xf, 576, 0, 0]);
    assert_eq!(read(&first(ROME, "-xsaves-xsavec"), 0xd, 1), [0x5, 0, 0, 0]);
    assert!(!first(ROME, "-xsave").as_slice().iter().any(|entry| entry.function == 0xd));
}

#[test]
fn a_supervisor_component_needs_its_feature_and_xsaves() {
    let mut rows = entries(SAPPHIRE);
    let shadow_stack = Leaves(rows.clone()).find(7, 0).expect("leaf 7").ecx | 1 << 7;
    for entry in &mut rows {
        match (entry.function, entry.index) {
            (7, 0) => entry.ecx = shadow_stack,
            (0xd, 1) => entry.ecx = 3 << 11,
            _ => {}
        }
    }
    rows.extend(entries(&[(0xd, 11, [0x10, 0, 1, 0]), (0xd, 12, [0x18, 0, 1, 0])]));
    for (mask, offered) in [("", 3 << 11), ("-user_shstk-ibt", 0), ("-xsaves", 0)] {
        let cpuid = Template::new(&rows, &spec(1, mask)).expect("a template").for_vcpu(0);
        assert_eq!(read(&cpuid, 0xd, 1)[2], offered, "{mask}");
        assert_eq!(read(&cpuid, 0xd, 11) != [0; 4], offered != 0, "{mask}");
        assert_eq!(shows(&cpuid, "user_shstk"), offered != 0, "{mask}");
    }
}

#[test]
fn a_feature_whose_registers_kvm_does_not_keep_is_hidden() {
    let mut rows = entries(SAPPHIRE);
    rows.retain(|entry| entry.function != 0xd || entry.index < 17);
    rows.iter_mut().filter(|entry| entry.function == 0xd && entry.index == 0).for_each(|entry| entry.eax = 0x2e7);
    let cpuid = Template::new(&rows, &spec(1, "")).expect("a template").for_vcpu(0);
    assert!(!shows(&cpuid, "amx_tile") && !shows(&cpuid, "amx_int8"));
    assert_eq!(read(&cpuid, 0x1d, 0), [0; 4]);
    assert!(shows(&cpuid, "avx512f"));
}

#[test]
fn a_demanded_feature_that_the_host_lacks_is_refused_by_name() {
    assert!(build(ROME, 1, "+avx2+rdrand").is_ok());
    assert_eq!(build(ROME, 1, "+avx2+avx512f").unwrap_err(), CpuidError::NotOffered { name: "avx512f" });
    assert_eq!(build(SAPPHIRE, 1, "+sgx").unwrap_err(), CpuidError::NotOffered { name: "sgx" });
    assert_eq!(build(ROME, 1, "+avx2-avx").unwrap_err(), CpuidError::Contradiction { name: "avx2" });
    assert_eq!(build(ROME, 1, "-aes+aes").unwrap_err(), CpuidError::Contradiction { name: "aes" });
}

#[test]
fn an_unknown_feature_is_refused_with_the_nearest_name() {
    let refuse = |mask: &str| mask.parse::<FeatureMask>().unwrap_err().to_string();
    assert!(refuse("-axv2").contains(r#""axv2"; did you mean "avx2"?"#), "{}", refuse("-axv2"));
    assert!(
        refuse("-quantum").starts_with(r#"There is no CPU feature "quantum"; the names"#),
        "{}",
        refuse("-quantum")
    );
    assert!(refuse("-ibrs|ibpb").contains("no CPU feature"));
}

#[test]
fn a_mask_without_signs_or_names_is_refused() {
    for text in ["avx2", "-", "+", "--avx2", "-avx2+", "é", " -avx2"] {
        let malformed = CpuidError::Malformed { text: text.to_owned() };
        assert_eq!(text.parse::<FeatureMask>().unwrap_err(), malformed, "{text:?}");
    }
}

#[test]
fn a_mask_is_printed_as_it_was_written() {
    for text in ["", "-avx2+aes", "+rdrand-ibpb-constant_tsc"] {
        let mask: FeatureMask = text.parse().expect("a mask");
        assert_eq!(mask.to_string(), text);
        assert_eq!(FeatureMask::try_from(String::from(mask.clone())).as_ref(), Ok(&mask));
    }
}

#[test]
fn the_table_names_no_more_bits_than_a_register_has_and_none_twice_in_it() {
    for (place, word) in WORDS.iter().enumerate() {
        let names: Vec<_> = word.3.split(' ').collect();
        assert!(names.len() <= 32 && !names.contains(&""), "word {place}");
        for (at, name) in names.iter().enumerate().filter(|(_, name)| **name != "-") {
            assert!(!names[..at].contains(name), "{name}");
        }
    }
    for (name, leaf, bit) in [("pbe", 1, 31), ("hypervisor", 1, 31), ("avx512vl", 7, 31), ("sgx_lc", 7, 30)] {
        assert!(features::named(name).any(|feature| WORDS[feature.word].0 == leaf && feature.bit == bit), "{name}");
    }
    for (name, leaf, bit) in [("ssbd", 7, 31), ("lam", 7, 26), ("apx", 7, 21), ("mwaitx", 0x8000_0001, 29)] {
        assert!(features::named(name).any(|feature| WORDS[feature.word].0 == leaf && feature.bit == bit), "{name}");
    }
    for (name, leaf, bit) in [("3dnow", 0x8000_0001, 31), ("brs", 0x8000_0008, 31), ("vnmi", 0x8000_000a, 25)] {
        assert!(features::named(name).any(|feature| WORDS[feature.word].0 == leaf && feature.bit == bit), "{name}");
    }
}

#[test]
fn more_entries_than_kvm_takes_are_refused() {
    let mut rows = entries(ROME);
    rows.extend((0..256).map(|index| kvm_cpuid_entry2 { function: 0x2, index, eax: 1, ..Default::default() }));
    let refused = Template::new(&rows, &spec(1, "")).unwrap_err();
    assert!(matches!(refused, CpuidError::TooManyEntries { count } if count > KVM_MAX_CPUID_ENTRIES), "{refused}");
}

/// Of features this says nothing: a KVM without hardware virtualisation (kvm_pvm) puts its own in the place of ours.
#[test]
fn this_hosts_kvm_takes_the_result() {
    let kvm = Kvm::new().unwrap_or_else(|error| {
        panic!("Cannot open /dev/kvm ({error}): load kvm_amd or kvm_intel, and join the group that owns it (kvm)")
    });
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("KVM_GET_SUPPORTED_CPUID");
    let vm = kvm.create_vm().expect("KVM_CREATE_VM");
    vm.create_irq_chip().expect("KVM_CREATE_IRQCHIP");
    let asked = CpuidSpec { tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer), ..spec(2, "-avx") };
    let template = Template::new(supported.as_slice(), &asked).expect("a template");
    for index in 0..2 {
        let vcpu = vm.create_vcpu(u64::from(index)).expect("KVM_CREATE_VCPU");
        vcpu.set_cpuid2(&template.for_vcpu(index)).expect("KVM_SET_CPUID2");
        let seen = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).expect("KVM_GET_CPUID2");
        assert_eq!(read(&seen, 0xb, 1), [1, 2, 0x201, u32::from(index)]);
        assert!(shows(&seen, "hypervisor"));
    }
}
