//! Memory, streams, events and graphs.

use super::*;
use crate::gpu::{GatherRows, HostBytes};

#[test]
fn memory_is_counted_and_comes_back() {
    let gpu = Gpu::emulated(1000);
    assert_eq!(gpu.memory().unwrap(), (1000, 1000));
    let buffer = gpu.zeros(600).unwrap();
    let part = buffer.at(100);
    assert_eq!(gpu.memory().unwrap().0, 400);
    let refusal = gpu.alloc(401).unwrap_err().to_string();
    assert_eq!(refusal, "allocating 401 bytes on the emulated device: 400 are free");
    drop(buffer);
    assert_eq!(gpu.memory().unwrap().0, 400, "the slice keeps its buffer");
    drop(part);
    assert_eq!(gpu.memory().unwrap().0, 1000);
}

#[test]
fn what_does_not_fit_is_refused() {
    let gpu = Gpu::emulated(MEMORY);
    let buffer = gpu.zeros(8).unwrap();
    let text = gpu.upload(&[1; 9], &buffer.all()).unwrap_err().to_string();
    assert_eq!(text, "upload: the end in bytes is 9, must be at most 8, the length of the slice");
    assert!(gpu.download(&buffer.at(4), &mut [0; 5]).is_err());
    assert!(gpu.copy(&buffer.all(), &buffer.at(4)).is_err());
    let pinned = gpu.pinned(4).unwrap();
    assert!(gpu.upload_pinned(&pinned, (1, 4), &buffer.all()).is_err());
    assert_eq!(bytes(&gpu, &buffer), [0; 8]);
}

#[test]
fn a_device_that_is_not_there_is_an_error_with_a_remedy() {
    let text = Gpu::cuda(63).unwrap_err().to_string();
    assert!(text.starts_with("opening CUDA device 63: "), "{text}");
    assert!(text.contains("use the cpu") || text.contains("numbered from 0"), "{text}");
}

#[test]
fn pinned_memory_waits_for_the_copies_that_use_it() {
    let gpu = Gpu::emulated(MEMORY);
    let copies = gpu.copies();
    let device = gpu.zeros(6).unwrap();
    let mut pinned = gpu.pinned(8).unwrap();
    pinned.copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    copies.upload_pinned(&pinned, (2, 6), &device.all()).unwrap();
    assert_eq!(bytes(&gpu, &device), [0; 6], "nobody has waited for the copy stream");
    pinned.fill(9);
    assert_eq!(bytes(&gpu, &device), [3, 4, 5, 6, 7, 8], "whoever writes to it waits");
    copies.download_pinned(&device.at(3), &mut pinned, 1).unwrap();
    assert_eq!(&pinned[..], [9, 6, 7, 8, 9, 9, 9, 9]);
}

#[test]
fn the_compute_stream_waits_for_an_event_of_the_copy_stream() {
    let gpu = Gpu::emulated(MEMORY);
    let copies = gpu.copies();
    let (device, result) = (gpu.zeros(4).unwrap(), gpu.zeros(4).unwrap());
    let mut pinned = gpu.pinned(4).unwrap();
    pinned.fill(7);
    copies.upload_pinned(&pinned, (0, 4), &device.all()).unwrap();
    let event = copies.record().unwrap();
    gpu.wait(&event).unwrap();
    gpu.copy(&device.all(), &result.all()).unwrap();
    assert_eq!(bytes(&gpu, &result), [7; 4]);
}

#[test]
fn a_graph_replays_what_was_recorded_on_what_its_buffers_hold_then() {
    let gpu = Gpu::emulated(MEMORY);
    let x = upload_u32(&gpu, &[10, 11, 12]);
    let rows = upload_u32(&gpu, &[0, 0]);
    let out = gpu.zeros(8).unwrap();
    let (from, picked, to) = (x.all(), rows.all(), out.all());
    let graph = gpu
        .capture(|| {
            GatherRows { x: &from, rows: &picked, out: &to, count: 2, limit: 3, width_bytes: 4 }
                .launch(&gpu)?;
            assert!(gpu.upload(&[1], &to).is_err(), "not while a graph is recorded");
            Ok(())
        })
        .unwrap();
    assert_eq!(download_u32(&gpu, &out), [0, 0], "recorded, not run");
    gpu.upload(&[2, 0, 0, 0, 1, 0, 0, 0], &rows.all()).unwrap();
    let free = gpu.memory().unwrap().0;
    drop((x, from, rows, picked));
    assert_eq!(gpu.memory().unwrap().0, free, "the graph keeps its memory");
    gpu.replay(&graph).unwrap();
    assert_eq!(download_u32(&gpu, &out), [12, 11]);
    let counters = gpu.counters();
    assert_eq!((counters.launches(), counters.captures(), counters.replays()), (1, 1, 1));
    drop(graph);
    assert_eq!(gpu.memory().unwrap().0, free + 20);
}

#[test]
fn a_recording_that_fails_leaves_the_device_usable() {
    let gpu = Gpu::emulated(MEMORY);
    let refused = gpu.capture(|| gpu.upload(&[1], &gpu.zeros(1)?.all()));
    assert!(refused.is_err());
    assert_eq!(bytes(&gpu, &gpu.uploaded(&[5]).unwrap()), [5]);
    assert!(gpu.copies().capture(|| Ok(())).is_err());
}

#[test]
fn rows_for_the_host_go_to_plain_memory_where_no_more_can_be_locked() {
    let gpu = Gpu::emulated(100);
    let device = gpu.uploaded(&[7; 80]).unwrap();
    for (len, is_pinned) in [(60, true), (101, false)] {
        let mut host = HostBytes::new(Some(&gpu), len);
        assert_eq!((host.len(), host.pinned().is_some()), (len, is_pinned));
        host.fill(1);
        host.download(&gpu.copies(), &device.all().first(20), 40).unwrap();
        assert_eq!((host[39], host[40], host[59]), (1, 7, 7));
        host.upload(&gpu.copies(), (30, 20), &device.all()).unwrap();
        gpu.copies().synchronize().unwrap();
        assert_eq!(bytes(&gpu, &device)[9..12], [1, 7, 7]);
        gpu.upload(&[7; 80], &device.all()).unwrap();
    }
    assert!(HostBytes::new(None, 10).pinned().is_none());
}
