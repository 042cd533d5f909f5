//! What a tenant may take of the pool and of the running sequences, under a flood of one of them.

use strand_engine::{Engine, EnginePlan, Request, TenantLimits, TierSetup};

use crate::random::Random;
use crate::simulation::{FakeRunner, plan};

/// A plan of the simulation, in which tenants may have shares.
pub fn plan_with_shares(random: &mut Random) -> EnginePlan {
    let plan = plan(random);
    let tenant = random.chance(40).then(|| TenantLimits {
        blocks: random.between(1, plan.num_blocks + 1),
        seqs: random.between(1, plan.max_num_seqs + 1),
    });
    EnginePlan { tenant, ..plan }
}

/// Steps until another tenant's request has its answer, beside ten of one tenant that want the
/// pool four times over; and how many sequences ran at most meanwhile.
fn steps_beside_a_flood(tenant: Option<TenantLimits>) -> (usize, usize) {
    let mut random = Random::new(3);
    let plan = EnginePlan {
        block_size: 4,
        num_blocks: 20,
        max_num_seqs: 6,
        max_num_batched_tokens: 256,
        max_model_len: 60,
        max_queue: 40,
        tenant,
        ..plan(&mut random)
    };
    let runner = FakeRunner::new(&plan, None);
    let mut engine = Engine::new(plan, runner, None, vec![], TierSetup::default());
    let submit = |engine: &mut Engine<FakeRunner>, who: &str, prompt: u32| {
        let prompt = (0..24).map(|n| (prompt + n) % 50).collect();
        let mut request = Request { salt: format!("{who}\0"), ..Request::new(prompt) };
        request.limits.max_tokens = Some(8);
        engine.submit(&request).expect("it fits")
    };
    for prompt in 0..10 {
        submit(&mut engine, "anna", prompt);
    }
    engine.step();
    let bens = submit(&mut engine, "ben", 30);
    let (mut steps, mut running) = (0, 0);
    while engine.is_alive(bens) {
        engine.step();
        engine.check_invariants();
        running = running.max(engine.stats().running);
        steps += 1;
    }
    while !engine.is_idle() {
        engine.step();
    }
    (steps, running)
}

#[test]
fn a_flood_of_one_tenant_leaves_others_their_room() {
    let limits = |blocks, seqs| Some(TenantLimits { blocks, seqs });
    let (steps, _) = steps_beside_a_flood(None);
    assert!(steps > 20, "without a share it waits for them: {steps}");
    // a step a token
    for tenant in [limits(10, 6), limits(20, 1), limits(1, 1)] {
        assert_eq!(steps_beside_a_flood(tenant).0, 8, "{tenant:?}");
    }
    assert_eq!(steps_beside_a_flood(limits(1, 6)).1, 2, "one of each always runs");
}
