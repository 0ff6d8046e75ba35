// Greedy answers of a real llama.cpp, for tests/benchmarks/compare_llama_cpp.py.
// In a folder where `npm install node-llama-cpp@3.22` ran: node llama_cpp_answers.mjs MODEL.gguf < asked.json
import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const library = createRequire(process.cwd() + "/").resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(library).href);
const {prompts, limit, threads} = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: threads});
const model = await llama.loadModel({modelPath: process.argv[2], gpuLayers: 0});
const answers = [];
for (const prompt of prompts) {
    const tokens = model.tokenize(prompt, true);  // control tokens in the text are control tokens
    const context = await model.createContext({contextSize: tokens.length + limit + 8});
    const answer = [];
    for await (const token of context.getSequence().evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
        answer.push(token);
        if (model.isEogToken(token) || answer.length >= limit)
            break;
    }
    answers.push({tokens, answer});
    await context.dispose();
}
console.log(JSON.stringify(answers));
