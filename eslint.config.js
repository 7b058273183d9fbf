import js from '@eslint/js';
import tseslint from 'typescript-eslint';

/** The script of an HTML file, on the lines that it has there. */
const scriptOf = {
  preprocess(html) {
    const [, before, script] = /^(.*<script[^>]*>)(.*)<\/script>/s.exec(html);
    return [{ text: before.replace(/[^\n]+/g, '') + script, filename: 'script.js' }];
  },
  postprocess: ([messages]) => messages,
};
/** What that script uses of a browser. */
const BROWSER = 'AbortController addEventListener Blob document fetch FormData performance setTimeout TextDecoder TextEncoder URL'.split(
  ' ',
);

export default tseslint.config(
  { ignores: ['dist/', 'build/', 'build-*/', 'out/', 'node_modules/', 'bench/peers/node_modules/'] },
  js.configs.recommended,
  {
    files: ['**/*.ts'],
    extends: [...tseslint.configs.recommendedTypeChecked],
    languageOptions: { parserOptions: { project: './tsconfig.all.json' } },
    rules: {
      '@typescript-eslint/no-non-null-assertion': 'off', // lengths are checked, and test code may assert
      '@typescript-eslint/restrict-template-expressions': ['error', { allowNumber: true }],
    },
  },
  {
    // tests read JSON, and misuse the interface on purpose
    files: ['test/**/*.ts'],
    rules: Object.fromEntries(
      ['explicit-any', 'unsafe-argument', 'unsafe-assignment', 'unsafe-call', 'unsafe-member-access', 'unsafe-return'].map((rule) => [
        `@typescript-eslint/no-${rule}`,
        'off',
      ]),
    ),
  },
  { files: ['lib/**/*.html'], processor: scriptOf },
  {
    files: ['lib/**/*.html/*.js'],
    languageOptions: { globals: Object.fromEntries(BROWSER.map((name) => [name, 'readonly'])) },
  },
  {
    files: ['**/*.mjs', '*.js'],
    languageOptions: { globals: { process: 'readonly', console: 'readonly', URL: 'readonly', setTimeout: 'readonly' } },
  },
);
