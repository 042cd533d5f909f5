// OpenAI's Node client against a running `strand serve`.
//
//     node clients.mjs http://127.0.0.1:8000 KEY
//
// Each case is written as a user of the library would write it; nothing is patched. One line a
// case; the exit status is 1 if any failed. The server must be started with that key.

import assert from "node:assert/strict";
import OpenAI from "openai";

const [address, apiKey] = process.argv.slice(2);
const baseURL = `${address}/v1`;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 60_000 });
const model = (await client.models.list()).data[0].id;
const messages = [
  { role: "system", content: "You are brief." },
  { role: "user", content: "Say something about the harbour." },
];
const chat = (fields) =>
  client.chat.completions.create({ model, messages, max_tokens: 24, temperature: 0, ...fields });

const cases = {
  async "a chat is answered"() {
    const answer = await chat();
    const [choice] = answer.choices;
    assert.equal(choice.message.role, "assistant");
    assert.ok(choice.message.content);
    assert.ok(["stop", "length"].includes(choice.finish_reason));
    const { prompt_tokens, completion_tokens, total_tokens } = answer.usage;
    assert.equal(total_tokens, prompt_tokens + completion_tokens);
  },

  async "a streamed chat is the same text"() {
    let text = "";
    let usage;
    const stream = await chat({ stream: true, stream_options: { include_usage: true } });
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    const whole = await chat();
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  },

  async "the helper for streams gathers the same"() {
    const fields = { model, messages, max_tokens: 24, temperature: 0 };
    const runner = client.chat.completions.stream(fields);
    assert.equal(await runner.finalContent(), (await chat()).choices[0].message.content);
  },

  async "several choices are numbered"() {
    const { choices } = await chat({ n: 3, temperature: 1.5, seed: 1 });
    assert.deepEqual(choices.map((choice) => choice.index).sort(), [0, 1, 2]);
  },

  async "a stop text ends the answer"() {
    const text = (await chat()).choices[0].message.content;
    const stop = text.slice(text.length / 2).slice(0, 3);
    const [choice] = (await chat({ stop })).choices;
    assert.equal(choice.message.content, text.slice(0, text.indexOf(stop)));
    assert.equal(choice.finish_reason, "stop");
  },

  async "logprobs name every token"() {
    const [choice] = (await chat({ logprobs: true, top_logprobs: 2, max_tokens: 4 })).choices;
    const { content } = choice.logprobs;
    assert.equal(content.length, 4);
    for (const token of content) assert.equal(token.top_logprobs.length, 2);
  },

  async "a completion takes text and lists"() {
    const fields = { model, max_tokens: 4, temperature: 0 };
    const ask = (prompt) => client.completions.create({ ...fields, prompt });
    const one = (await ask("The harbour")).choices[0].text;
    const both = (await ask(["The harbour", "The harbour"])).choices;
    assert.deepEqual(both.map((choice) => choice.text), [one, one]);
  },

  async "a schema is kept to, and a tool called"() {
    const colours = ["red", "green"];
    const schema = {
      type: "object",
      properties: { colour: { enum: colours } },
      required: ["colour"],
      additionalProperties: false,
    };
    const json_schema = { name: "gate", strict: true, schema };
    const response_format = { type: "json_schema", json_schema };
    const shaped = await chat({ response_format, max_tokens: 64 });
    assert.ok(colours.includes(JSON.parse(shaped.choices[0].message.content).colour));
    const tools = [{ type: "function", function: { name: "paint", parameters: schema } }];
    const [choice] = (await chat({ tools, tool_choice: "required", max_tokens: 64 })).choices;
    const [call] = choice.message.tool_calls;
    assert.equal(call.function.name, "paint");
    assert.ok(colours.includes(JSON.parse(call.function.arguments).colour));
  },

  async "text is embedded"() {
    const ask = (input) => client.embeddings.create({ model, input });
    const [one] = (await ask("The harbour")).data;
    const both = (await ask(["The harbour", "The gate"])).data;
    assert.ok(one.embedding.length > 0);
    assert.equal(both.length, 2);
    assert.ok(one.embedding.every((x, i) => Math.abs(x - both[0].embedding[i]) < 1e-5));
  },

  async "a response is created and streamed"() {
    const fields = { model, input: "Say something.", max_output_tokens: 16, temperature: 0 };
    const answer = await client.responses.create(fields);
    assert.ok(answer.output_text);
    let text = "";
    for await (const event of await client.responses.create({ ...fields, stream: true })) {
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    assert.equal(text, answer.output_text);
  },

  async "errors are of their class"() {
    const other = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
    await assert.rejects(other.models.list(), OpenAI.AuthenticationError);
    await assert.rejects(chat({ model: "no-such" }), OpenAI.NotFoundError);
    await assert.rejects(chat({ temperature: -0.1 }), (error) => {
      return error instanceof OpenAI.BadRequestError && error.param === "temperature";
    });
    const content = "harbour ".repeat(20_000);
    await assert.rejects(chat({ messages: [{ role: "user", content }] }), (error) => {
      return error.code === "context_length_exceeded";
    });
  },

  async "who leaves a stream is not waited for"() {
    for (let left = 0; left < 4; left++) {
      const long = { max_tokens: 400, temperature: 1, ignore_eos: true };
      const stream = await chat({ stream: true, ...long });
      for await (const _ of stream) break;
    }
    const started = performance.now();
    await chat({ max_tokens: 1 });
    assert.ok(performance.now() - started < 10_000);
  },
};

let failed = 0;
for (const [name, check] of Object.entries(cases)) {
  const started = performance.now();
  let word = "ok    ";
  try {
    await check();
  } catch (error) {
    console.error(error);
    word = "FAILED";
    failed += 1;
  }
  console.log(`${word} ${name} (${((performance.now() - started) / 1000).toFixed(1)} s)`);
}
const count = Object.keys(cases).length;
console.log(`${count - failed} of ${count} passed, node ${process.version}`);
process.exit(failed ? 1 : 0);
