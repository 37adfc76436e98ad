//! Model-specific registers as a kernel expects to find them (SDM Vol. 4, chapter 2).

/// IA32_MISC_ENABLE. Bit 0: fast strings, `rep movs` moves whole cache lines.
const IA32_MISC_ENABLE: u32 = 0x1a0;
/// IA32_MTRR_DEF_TYPE (SDM Vol. 3A 12.11.2.1). Bit 11: MTRRs on; bits 0 to 7: type of all memory that no
/// range covers, 6 is write-back.
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

/// Index and value of each register that must not be what KVM resets it to.
pub const AT_ENTRY: &[(u32, u64)] = &[(IA32_MISC_ENABLE, 1), (IA32_MTRR_DEF_TYPE, 1 << 11 | 6)];
