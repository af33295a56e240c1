// OpenAI's client for Node and Vercel's AI SDK: a line of JSON a case, {"client", "case", "error"}.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// the packages lie in an environment of their own, not beside this file
const require = createRequire(pathToFileURL(process.env.NODE_FOLDER + "/package.json"));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { default: OpenAI } = await load("openai");
const { zodResponseFormat } = await load("openai/helpers/zod");
const { generateText, streamText, generateObject, embed, tool, stepCountIs } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createOpenAI } = await load("@ai-sdk/openai");
const { z } = await load("zod");

const model = process.env.MODEL, url = process.env.OPENAI_BASE_URL, key = process.env.OPENAI_API_KEY;
const hello = [{ role: "user", content: "the quick brown" }];
const Trip = z.object({ city: z.enum(["Paris", "Oslo"]), again: z.boolean() });
const parameters = {
  type: "object", properties: { city: { enum: ["Paris", "Oslo"] } }, required: ["city"], additionalProperties: false,
};
const weather = { type: "function", function: { name: "weather", parameters } };
const node = new OpenAI({ maxRetries: 0 });
const compatible = createOpenAICompatible({
  name: "local", baseURL: url, apiKey: key, includeUsage: true, supportsStructuredOutputs: true });
const official = createOpenAI({ baseURL: url, apiKey: key });

function ok(condition, what) {
  if (!condition) throw new Error(what);
}

async function run(client, cases) {
  for (const [name, one] of Object.entries(cases)) {
    let error = null;
    try {
      await one();
    } catch (failure) {
      error = `${failure.name}: ${failure.message} ${failure.responseBody ?? ""}`.slice(0, 400);
    }
    console.log(JSON.stringify({ client, case: name, error }));
  }
}

await run("openai (Node)", {
  "chat, and nulls": async () => {
    const done = await node.chat.completions.create({
      model, messages: hello, max_tokens: 8, temperature: null, top_p: null, n: null, stop: null, logprobs: null });
    ok(done.usage.completion_tokens > 0, "no tokens");
  },
  "stream": async () => {
    let text = "";
    const ask = { model, messages: hello, max_tokens: 8, temperature: 0 };
    for await (const chunk of await node.chat.completions.create({ ...ask, stream: true }))
      text += chunk.choices[0]?.delta?.content ?? "";
    ok(text === (await node.chat.completions.create(ask)).choices[0].message.content, "the stream differs");
  },
  "tools, and the answer goes back": async () => {
    const done = await node.chat.completions.create({
      model, messages: hello, max_tokens: 1000, tools: [weather], tool_choice: "required" });
    const message = done.choices[0].message;
    await node.chat.completions.create({ model, max_tokens: 8, tools: [weather], messages: [
      ...hello, message, { role: "tool", tool_call_id: message.tool_calls[0].id, content: "sunny" }] });
  },
  "parse() with zod": async () => {
    const done = await node.chat.completions.parse({
      model, messages: hello, max_tokens: 1000, temperature: 0, response_format: zodResponseFormat(Trip, "trip") });
    ok(done.choices[0].message.parsed.city, "nothing parsed");
    await node.chat.completions.create({ model, max_tokens: 8, messages: [...hello, done.choices[0].message, ...hello] });
  },
  "runTools()": async () => {
    const runner = node.chat.completions.runTools({
      model, messages: hello, max_tokens: 1000, tool_choice: { type: "function", function: { name: "weather" } },
      tools: [{ type: "function", function: { name: "weather", parameters, parse: JSON.parse, function: () => "sunny" } }],
    }, { maxChatCompletions: 2 });
    await runner.done();
  },
  "responses: text and a stream": async () => {
    const done = await node.responses.create({ model, input: "fox", max_output_tokens: 16 });
    ok(typeof done.output_text === "string", "no text");
    let last = "";
    for await (const event of await node.responses.create({ model, input: "fox", max_output_tokens: 16, stream: true }))
      last = event.type;
    ok(["response.completed", "response.incomplete"].includes(last), last);
  },
  "embeddings": async () => {
    ok((await node.embeddings.create({ model, input: ["fox"] })).data[0].embedding.length > 1, "no numbers");
  },
});

const sdk = (name, chat) => ({
  [`${name}: generateText`]: async () => {
    const done = await generateText({ model: chat, prompt: "fox", maxOutputTokens: 16, maxRetries: 0 });
    ok(done.usage.outputTokens > 0, "no tokens");
  },
  [`${name}: streamText`]: async () => {
    const done = streamText({ model: chat, prompt: "fox", maxOutputTokens: 16, maxRetries: 0, onError() {} });
    let text = "";
    for await (const part of done.textStream) text += part;
    ok((await done.finishReason) !== "error", "the stream ended with an error");
  },
  [`${name}: generateObject`]: async () => {
    const done = await generateObject({ model: chat, schema: Trip, prompt: "fox", maxOutputTokens: 1000, maxRetries: 0,
      temperature: 0 });
    ok(done.object.city, "no object");
  },
  [`${name}: a tool in two steps`]: async () => {
    const done = await generateText({
      model: chat, prompt: "fox", maxOutputTokens: 1000, maxRetries: 0, stopWhen: stepCountIs(2), toolChoice: "required",
      tools: { weather: tool({ description: "the weather", inputSchema: z.object({ city: z.enum(["Paris", "Oslo"]) }),
        execute: async () => "sunny" }) } });
    ok(done.steps.length === 2, `${done.steps.length} steps`);
  },
});
await run("Vercel AI SDK", {
  ...sdk("openai-compatible", compatible(model)), ...sdk("openai responses", official(model)),
  ...sdk("openai chat", official.chat(model)),
  "embed": async () => {
    ok((await embed({ model: compatible.embeddingModel(model), value: "fox", maxRetries: 0 })).embedding.length > 1, "none");
  },
});
