//! What `cpuid` tells a guest (SDM Vol. 2A, CPUID; AMD APM Vol. 3, appendix E).
//!
//! KVM lists the leaves that the host CPU and KVM itself can give to guests. All of them are passed on.
//! Only what describes the *shape* of the machine is rewritten for each vCPU: its APIC id, and how many
//! cores one package has. sarang builds one socket of N cores with one thread each, and every leaf that
//! has a word on topology says the same, in the way of both vendors.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1, ECX: x2APIC, TSC-deadline timer, running under a hypervisor.
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the package may hold more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 8000_0001, ECX: HTT means cores, not threads (AMD).
const CMP_LEGACY: u32 = 1 << 1;

/// A vCPU's place in the machine.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// Index of this vCPU, which is also its APIC id.
    pub index: u32,
    /// How many there are, at least 1.
    pub count: u32,
}

impl Topology {
    /// Bits of the APIC id that number the cores of one package.
    fn core_bits(self) -> u32 {
        self.count.max(1).next_power_of_two().trailing_zeros()
    }
}

/// The CPUID of one vCPU, from what the host supports.
pub fn for_vcpu(supported: &CpuId, topology: Topology) -> CpuId {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .copied()
        // Both extended topology leaves are built anew; without 1F, software uses 0B.
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .collect();
    let amd = entries
        .iter()
        .any(|entry| entry.function == 0 && is_amd(entry));
    for entry in &mut entries {
        rewrite(entry, topology, amd);
    }
    entries.extend(extended_topology(topology));
    // The list can only have become too long for KVM if it was so before; then it is passed as it was.
    CpuId::from_entries(&entries).unwrap_or_else(|_| supported.clone())
}

/// How many bits a guest physical address can have, from what the host supports (leaf 8000_0008, EAX; without it,
/// 36). Where nested paging reaches less far than the CPU, bits 23 to 16 say how far.
pub fn physical_address_bits(supported: &CpuId) -> u32 {
    let widths = supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == 0x8000_0008)
        .map_or(0, |entry| entry.eax);
    let (cpu, guest) = (widths & 0xff, widths >> 16 & 0xff);
    match (cpu, guest) {
        (0, _) => 36,
        (cpu, 0) => cpu,
        (cpu, guest) => cpu.min(guest),
    }
}

/// "AuthenticAMD" or "HygonGenuine" by the first four letters, in EBX.
fn is_amd(leaf0: &kvm_cpuid_entry2) -> bool {
    [*b"Auth", *b"Hygo"].contains(&leaf0.ebx.to_le_bytes())
}

fn rewrite(entry: &mut kvm_cpuid_entry2, topology: Topology, amd: bool) {
    let Topology { index, count } = topology;
    let cores = 1_u32 << topology.core_bits();
    match entry.function {
        // Highest basic leaf: software must find 0B.
        0 => entry.eax = entry.eax.max(0xb),
        1 => {
            entry.ebx = entry.ebx & 0xffff | index << 24 | cores.min(255) << 16;
            entry.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
            entry.edx = if count > 1 {
                entry.edx | HTT
            } else {
                entry.edx & !HTT
            };
        }
        // Caches (Intel 4, AMD 8000_001D). Level 3 serves all cores, the others one each.
        4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { cores - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
            if entry.function == 4 {
                entry.eax |= (cores - 1).min(63) << 26;
            }
        }
        0x8000_0001 if amd && count > 1 => entry.ecx |= CMP_LEGACY,
        // Core count, and the width of its field in the APIC id.
        0x8000_0008 if amd => {
            entry.ecx = entry.ecx & !0xf0ff | topology.core_bits() << 12 | (count - 1);
        }
        // Extended APIC id; compute unit of one thread; node 0 of one.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index & 0xff, 0),
        _ => {}
    }
}

/// Leaf 0B: level 0 is threads of a core, level 1 cores of a package, level 2 ends the list.
fn extended_topology(topology: Topology) -> [kvm_cpuid_entry2; 3] {
    const SMT: u32 = 1;
    const CORE: u32 = 2;
    let level = |number: u32, kind: u32, shift: u32, processors: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index: number,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: kind << 8 | number,
        edx: topology.index,
        ..Default::default()
    };
    [
        level(0, SMT, 0, 1),
        level(1, CORE, topology.core_bits(), topology.count),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(vendor: &[u8; 4]) -> CpuId {
        let entry = |function, eax, ebx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ..Default::default()
        };
        CpuId::from_entries(&[
            entry(0, 7, u32::from_le_bytes(*vendor)),
            entry(1, 0, 0x0123_0800),
            entry(4, 0x21, 0),
            entry(4, 0x63, 0),
            entry(0xb, 9, 9),
            entry(0x1f, 9, 9),
            entry(0x8000_0001, 0, 0),
            entry(0x8000_0008, 0, 0),
            entry(0x8000_001e, 9, 9),
        ])
        .unwrap()
    }

    fn leaves(cpuid: &CpuId, function: u32) -> Vec<kvm_cpuid_entry2> {
        cpuid
            .as_slice()
            .iter()
            .copied()
            .filter(|entry| entry.function == function)
            .collect()
    }

    #[test]
    fn every_leaf_on_topology_agrees_for_one_to_sixty_four_cores() {
        for count in 1..=64 {
            for index in [0, count - 1] {
                let cpuid = for_vcpu(&host(b"Auth"), Topology { index, count });
                let one = leaves(&cpuid, 1)[0];
                assert_eq!(one.ebx >> 24, index);
                assert_eq!(one.edx & HTT != 0, count > 1);
                let extended = leaves(&cpuid, 0xb);
                assert_eq!(extended.len(), 3);
                assert_eq!(extended[1].ebx, count);
                assert!(
                    1 << extended[1].eax >= count,
                    "the APIC id field holds all cores"
                );
                assert!(extended.iter().all(|level| level.edx == index));
                let amd = leaves(&cpuid, 0x8000_0008)[0];
                assert_eq!(amd.ecx & 0xff, count - 1);
                assert_eq!(amd.ecx >> 12 & 0xf, extended[1].eax);
                assert_eq!(leaves(&cpuid, 0x8000_001e)[0].eax, index);
                let caches = leaves(&cpuid, 4);
                assert_eq!(caches[0].eax >> 14 & 0xfff, 0, "the first level is private");
                assert!(
                    (caches[1].eax >> 14 & 0xfff) + 1 >= count,
                    "the third is shared"
                );
                assert!(leaves(&cpuid, 0x1f).is_empty());
            }
        }
    }

    #[test]
    fn the_address_width_is_the_smaller_of_the_cpus_and_of_nested_paging() {
        for (eax, bits) in [(None, 36), (Some(0x3027), 39), (Some(0x30_3034), 48)] {
            let leaf = eax.map(|eax| kvm_cpuid_entry2 {
                function: 0x8000_0008,
                eax,
                ..Default::default()
            });
            let cpuid = CpuId::from_entries(leaf.as_slice()).unwrap();
            assert_eq!(physical_address_bits(&cpuid), bits);
        }
    }

    #[test]
    fn amd_fields_stay_untouched_on_an_intel_host() {
        let cpuid = for_vcpu(&host(b"Genu"), Topology { index: 0, count: 8 });
        assert_eq!(leaves(&cpuid, 0x8000_0008)[0].ecx, 0);
        assert_eq!(leaves(&cpuid, 0x8000_0001)[0].ecx, 0);
    }
}
