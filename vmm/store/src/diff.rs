//! How two snapshots differ.

use crate::buffer::Buffer;
use crate::chunk::CHUNK_BYTES;
use crate::error::StoreError;
use crate::read::Kept;

/// Bytes of a page.
const PAGE: usize = 4096;

/// How two snapshots differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Regions that are the same and not zeros in both.
    pub same: u64,
    /// Regions that differ, in order. Beyond the end of the shorter memory all are zeros.
    pub regions: Vec<u64>,
    /// Pages of these that differ.
    pub pages: u64,
    /// Parts of the machine that differ, or that one of them has alone.
    pub parts: Vec<String>,
}

/// Compares two snapshots, of one store or of two. What they have in common by name is not read; of what differs
/// each page is compared. `goes_on` is told how many regions are done of how many, and says whether to go on.
///
/// # Errors
/// If a chunk that differs cannot be read, or it was called off.
pub fn diff(
    one: &Kept,
    other: &Kept,
    goes_on: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Difference, StoreError> {
    let mut found = Difference::default();
    let regions = one.index().iter().chain(other.index().iter());
    let mut regions: Vec<u64> = regions.map(|(region, _)| region).collect();
    regions.sort_unstable();
    regions.dedup();
    let all = regions.len() as u64;
    let mut content = [(); 2].map(|()| Buffer::new(CHUNK_BYTES as usize));
    for (done, region) in (0..).zip(regions) {
        if !goes_on(done, all) {
            return Err(StoreError::CalledOff);
        }
        if one.index().get(region) == other.index().get(region) {
            found.same += 1;
            continue;
        }
        for (kept, content) in [one, other].into_iter().zip(&mut content) {
            content.fill(0);
            let bytes = kept.index().region_bytes(region) as usize;
            kept.region(region, &mut content[..bytes])?;
        }
        let [a, b] = &content;
        let pages = a.chunks(PAGE).zip(b.chunks(PAGE));
        found.pages += pages.filter(|(a, b)| a != b).count() as u64;
        found.regions.push(region);
    }
    goes_on(all, all);
    let differs = |part: &crate::parts::Part, other: &Kept| other.part(&part.name) != Some(part);
    let ours = one.parts().iter().filter(|part| differs(part, other));
    let theirs = other
        .parts()
        .iter()
        .filter(|part| one.part(&part.name).is_none());
    found.parts = ours.chain(theirs).map(|part| part.name.clone()).collect();
    Ok(found)
}
